"""Runs: notebooks as jobs, by hand or on a schedule.

notebooks.discover(settings), notebooks.find(name, settings)   which there are, and their parameters
Jobs.submit("notebook", {"notebook": name, "parameters": {…}}) runs one; its executed form and record go to MLflow
schedules.Schedules(store, home_dir)                           add, list, remove, enable, history
record.record(kind, values)                                    the last cell of a notebook: its typed record
``python -m workbench.runs.scheduler``                         fires what is due
"""
