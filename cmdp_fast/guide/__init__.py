"""The documentation as a site: one builder for the guides beside their code and for the API reference (extra `docs`).

    python -m cmdp_fast.guide build/site

It is built from a clone alone and needs no network, neither to be built nor to be read. `pages.py` is the table of its
pages, `markdown.py` and `sources.py` make one folder of them, `api.py` adds the API reference, and `site.py` runs
Sphinx over it, whose warnings are errors. Guides that have no code of their own stand in this folder.
"""
