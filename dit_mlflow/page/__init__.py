"""One self-contained page that shows all of an influence run."""

from dit_mlflow.page.page import influence_page

__all__ = ["influence_page"]
