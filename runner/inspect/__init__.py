"""The verbs that look at runs and use what they left, one file each: `python -m runner VERB`."""
