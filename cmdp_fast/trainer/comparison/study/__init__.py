"""`cmdp-fast compare --study`: many situations, many methods, and a page of what was found."""
