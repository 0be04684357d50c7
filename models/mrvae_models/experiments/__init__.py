"""The paper's experiments as data: runs, what is evaluated of each, and a page with tables and a picture.

    catalogue.py    the experiments, by name
    plan.py         Run, Settings, Experiment; no torch, so that they can be listed at once
    execution.py    runs in processes or on a cluster, resumable
    evaluation.py   the numbers of one trained run
    tables.py, figures.py, page.py    what is written of them
"""
