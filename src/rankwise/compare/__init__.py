"""A recipe of models, tasks, methods and seeds as a grid of cells, each run to one result file."""
