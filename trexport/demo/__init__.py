"""`trexport demo`: the whole line on the sample that ships in the package."""
