"""Methods side by side: `ssltrain compare`.

`plan.py` says which runs a comparison has, `studies.py` those of the ready-made ones, `tuning.py` how options are
chosen; `jobs.py` runs them one after another, `course.py` all of it; `figures.py` reads what they found, `tables.py`,
`plots.py` and `page.py` show it.
"""
