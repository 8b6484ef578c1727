"""``metaflow hf doctor``: what is configured and installed here, whether it works, and how to fix what does not."""

from metaflow_hf_cli.checks.findings import Check, Finding

__all__ = ["Check", "Finding", "all_checks"]


def all_checks() -> list[Check]:
    """Everything that is looked at, in the order in which it is shown; nothing is looked at yet."""
    from metaflow_hf_cli.checks import machine, packages, services

    return [*packages.checks(), *services.checks(), *machine.checks()]
