"""The decorators by name. Their modules import nothing heavy: an error here would break ``import metaflow``."""

STEP_DECORATORS_DESC = [
    ("checkpoint", ".checkpoint_decorator.CheckpointDecorator"),
    ("huggingface_hub", ".huggingface_hub_decorator.HuggingfaceHubDecorator"),
    ("model", ".model_decorator.ModelDecorator"),
    ("pinned_gpus", ".pinned_gpus_decorator.PinnedGpusDecorator"),
]
