"""Studies: many short trainings on the same slices and budget, compared with one another. ``experiments/study.py``."""
