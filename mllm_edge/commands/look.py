"""The commands that show what is here: systems, recipes, a bundle, this machine."""

from __future__ import annotations

import dataclasses

from mllm_edge.commands.frame import BundleFolder, NoVerifyHash, verb
from mllm_edge.commands.screen import Screen


@verb("systems", "systems --json")
def systems(screen: Screen) -> None:
    """List the systems: tasks, stages, sizes, licenses."""
    from mllm_edge import models
    from mllm_edge.commands.shown import system_table

    known = [models.get(name) for name in models.SYSTEMS]
    public = [vars(info) for info in known]
    screen.result({"systems": public}, system_table(known))


@verb("recipes")
def recipes(screen: Screen) -> None:
    """List the recipes that ship."""
    from mllm_edge.recipes.recipe import available
    from mllm_edge.tables import pairs

    known = available()
    screen.result({"recipes": known}, pairs("", known))


@verb("inspect my.bundle", "inspect my.bundle --json")
def inspect_(screen: Screen, bundle: BundleFolder, no_verify_hash: NoVerifyHash = False) -> None:
    """Show what is inside a bundle."""
    from mllm_edge.bundle.read import read_manifest
    from mllm_edge.commands.shown import bundle_tables

    manifest = read_manifest(bundle, verify_hash=not no_verify_hash)
    screen.result(dataclasses.asdict(manifest), *bundle_tables(bundle, manifest))


@verb("doctor", "doctor --json")
def doctor(screen: Screen) -> None:
    """Say what this machine has and lacks. What is missing comes with the line that installs it."""
    from mllm_edge.doctor import examine, tables

    findings = examine()
    screen.result(findings.to_json(), *tables(findings))
