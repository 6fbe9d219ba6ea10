"""The report: one HTML file that compares any number of runs, with figures, tables and the evaluation card beside it."""

from robust_vit.report.build import write as write
