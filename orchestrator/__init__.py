"""The driver: a sweep file becomes a plan, the plan becomes rows, the rows become a report. Imports no torch."""
