import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_runtime_imports_without_the_export_side() -> None:
    code = """
import sys
for name in ("torch", "transformers", "onnx", "gguf", "typer", "rich", "safetensors"):
    sys.modules[name] = None
import mllm_edge
mllm_edge.load
import mllm_edge.runtime.engines.llama.model, mllm_edge.runtime.engines.ort, mllm_edge.runtime.engines.llama.probe
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_board_builds_engines_without_the_export_side() -> None:
    code = """
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "gguf", "safetensors"):
    sys.modules[name] = None
import mllm_edge.export.tensorrt.build
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_starts_nothing() -> None:
    code = """
import sys, mllm_edge
heavy = {"torch", "transformers", "onnx", "onnxruntime", "llama_cpp", "numpy", "PIL"} & sys.modules.keys()
assert not heavy, heavy
import mllm_edge.runtime
heavy = {"onnxruntime", "llama_cpp"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_unknown_attribute_is_an_attribute_error() -> None:
    done = run("import mllm_edge\nassert not hasattr(mllm_edge, 'nothing') and mllm_edge.__version__ == '0.1.0'")
    assert done.returncode == 0, done.stderr
