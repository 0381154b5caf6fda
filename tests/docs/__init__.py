"""The pages for a reader show what is: their commands run, their recipes work, what they name exists."""
