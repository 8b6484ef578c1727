"""A chart as a picture, for pages that draw none: a model card, an e-mail."""

from importlib import import_module

from metaflow_hf.errors import ConfigError
from metaflow_hf.report.charts import Spec


def svg(chart: Spec, *, width: int = 720) -> str:
    """The chart as SVG, ``width`` pixels wide. Needs the extra ``publish``; raises ``ConfigError`` without it."""
    try:
        renderer = import_module("vl_convert")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "a chart becomes a picture by vl-convert-python, which is not installed: pip install 'metaflow-hf[publish]'."
        ) from error
    picture: str = renderer.vegalite_to_svg({**chart, "width": width, "background": "white"})
    return picture
