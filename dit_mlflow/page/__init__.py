"""One self-contained page that shows an influence run whole."""

from dit_mlflow.page.page import influence_page

__all__ = [
    "influence_page",
]
