"""SAM's blocks against transformers' `SamModel` on the same random weights."""

import re

import pytest
import torch

from mllm_edge.models.blocks import sam
from mllm_edge.models.blocks.sam import SamDims, SamImageEncoder
from mllm_edge.models.blocks.sam_decoder import MaskDecoder, MaskDecoderDims, PromptEncoder

DIMS = SamDims(160, 16, 32, 3, 4, 64, window=4, global_layers=(1,), out_width=32)  # 10 cells: windows need padding
DECODER = MaskDecoderDims(grid=10, width=32, heads=4, mlp_width=48)

RENAMED = (
    (r"layer_norm(\d)", r"norm\1"),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.patch_embed\.projection", "image_encoder.patch_embed.proj"),
    (r"^vision_encoder\.neck\.conv1", "image_encoder.neck.0"),
    (r"^vision_encoder\.neck\.norm1", "image_encoder.neck.1"),
    (r"^vision_encoder\.neck\.conv2", "image_encoder.neck.2"),
    (r"^vision_encoder\.neck\.norm2", "image_encoder.neck.3"),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^shared_image_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^mask_decoder\.upscale_conv1", "mask_decoder.output_upscaling.0"),
    (r"^mask_decoder\.upscale_layer_norm", "mask_decoder.output_upscaling.1"),
    (r"^mask_decoder\.upscale_conv2", "mask_decoder.output_upscaling.3"),
    (r"layer_norm_final_attn", "norm_final_attn"),
    (r"(output_hypernetworks_mlps\.0)\.proj_in", r"\1.layers.0"),
    (r"(output_hypernetworks_mlps\.0)\.proj_out", r"\1.layers.2"),
    (r"(output_hypernetworks_mlps\.0)\.layers\.0\.(?=\w+$)", r"\1.layers.1."),
)


@pytest.fixture(scope="module")
def reference():
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": DIMS.width,
            "num_hidden_layers": DIMS.layers,
            "num_attention_heads": DIMS.heads,
            "image_size": DIMS.image_size,
            "patch_size": DIMS.patch_size,
            "window_size": DIMS.window,
            "global_attn_indexes": list(DIMS.global_layers),
            "output_channels": DIMS.out_width,
            "mlp_dim": DIMS.mlp_width,
            "num_pos_feats": DIMS.out_width // 2,
        },
        prompt_encoder_config={
            "hidden_size": DIMS.out_width,
            "image_size": DIMS.image_size,
            "patch_size": DIMS.patch_size,
        },
        mask_decoder_config={
            "hidden_size": DIMS.out_width,
            "mlp_dim": DECODER.mlp_width,
            "num_attention_heads": DECODER.heads,
            "iou_head_hidden_dim": 32,
        },
    )
    model = SamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def part(reference, prefix):
    state = {}
    for name, tensor in reference.state_dict().items():
        if re.match(r"mask_decoder\.output_hypernetworks_mlps\.[1-3]\.|mask_decoder\.iou_prediction", name):
            continue  # SAM's other outputs
        order = RENAMED if "hypernetworks_mlps.0.layers" not in name else RENAMED[-1:]
        for pattern, new in order:
            renamed = re.sub(pattern, new, name)
            if pattern.startswith(r"(output_hyper") and renamed != name:
                name = renamed
                break
            name = renamed
        if name.startswith(prefix):
            state[name.removeprefix(prefix)] = tensor
    return state


def load(module, state):
    result = module.load_state_dict(state, strict=False)
    assert not result.missing_keys
    return module.eval()


@pytest.mark.parametrize("scores", [1 << 26, 10_000], ids=["whole", "head by head"])
def test_image_encoder_equals_transformers(reference, scores, monkeypatch):
    monkeypatch.setattr(sam, "SCORES", scores)
    ours = load(SamImageEncoder(DIMS), part(reference, "image_encoder."))
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = reference.get_image_embeddings(pixels)
        assert torch.allclose(ours(pixels), expected, atol=1e-4 * float(expected.abs().max()))


def masks(reference, **prompt):
    with torch.no_grad():
        return reference(multimask_output=False, **prompt).pred_masks[0, :, 0]


def test_points_and_boxes_give_transformers_masks(reference):
    prompts = load(PromptEncoder(DECODER), part(reference, "prompt_encoder."))
    decoder = load(MaskDecoder(DECODER), part(reference, "mask_decoder."))
    embedding = torch.randn(1, 32, 10, 10)
    points = torch.tensor([[30.0, 40.0], [100.0, 90.0], [7.0, 150.0]])
    boxes = torch.tensor([[10.0, 20.0, 60.0, 80.0], [0.0, 0.0, 159.0, 100.0]])
    expected = masks(reference, image_embeddings=embedding, input_points=points[None, :, None])
    with torch.no_grad():
        ours = decoder(embedding, prompts.points((points + 0.5) / 160), prompts)
    assert ours.shape == (3, 40, 40)
    assert torch.allclose(ours, expected, atol=1e-3 * float(expected.abs().max()))
    expected = masks(reference, image_embeddings=embedding, input_boxes=boxes[None])
    with torch.no_grad():
        ours = decoder(embedding, prompts.boxes((boxes + 0.5) / 160), prompts)
    assert torch.allclose(ours, expected, atol=1e-3 * float(expected.abs().max()))


def test_an_embedding_stands_where_a_point_would(reference):
    """GLaMM's prompt is an embedding; that of a box's corners makes transformers' mask of the box, alone or among
    others."""
    prompts = load(PromptEncoder(DECODER), part(reference, "prompt_encoder."))
    decoder = load(MaskDecoder(DECODER), part(reference, "mask_decoder."))
    embedding = torch.randn(1, 32, 10, 10)
    box = torch.tensor([[10.0, 20.0, 60.0, 80.0]])
    with torch.no_grad():
        corners = prompts.boxes((box + 0.5) / 160)
        alone = decoder(embedding, corners, prompts)
        among = decoder(embedding, torch.cat([torch.randn(2, 2, 32), corners]), prompts)[2:]
        many = decoder(embedding.expand(3, -1, -1, -1), torch.cat([corners] * 3), prompts)
    expected = masks(reference, image_embeddings=embedding, input_boxes=box[None])
    assert torch.allclose(alone, expected, atol=1e-3 * float(expected.abs().max()))
    assert torch.allclose(alone, among, atol=1e-3)
    assert torch.allclose(many, alone.expand(3, -1, -1), atol=1e-3)
