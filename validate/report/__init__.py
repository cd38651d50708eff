"""Shows a run to people: the page, the model card and the last lines in the terminal, all from report.json.

Plans take words and numbers from here, so the package imports none of its pages.
"""
