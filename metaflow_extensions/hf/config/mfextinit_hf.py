"""What this extension adds to Metaflow's configuration: how Runner and Deployer pass parameters of our types."""


def get_click_to_python_types() -> dict[type, type]:
    """Types of parameters, and what they are in Python."""
    from metaflow_extensions.hf.parameters import CheckedText

    return {CheckedText: str}
