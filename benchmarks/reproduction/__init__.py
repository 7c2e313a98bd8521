"""The paper's tables and figures (arXiv 2502.10793), run again on the projects: ``mlflow run . -e reproduce``.

A table is one parent run with a child for each data set, model, method and seed. What is expensive is kept in
``build/reproduction`` as it is found, so that a reproduction that was broken off goes on where it was.
"""
