"""What a run leaves behind, and what is done with it.

report.py, form.py, provenance.py    report.json: its form, and where it comes from
page.py, grids.py                    report.html
consistency.py, verify.py            whether a report can be believed
matrix.py                            the table of what runs where
"""
