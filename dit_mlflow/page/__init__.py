"""One self-contained page that shows all of an influence run."""

from dit_mlflow.page.page import explanation_page, influence_page

__all__ = ["explanation_page", "influence_page"]
