"""Build the documentation as a site: ``python -m website``, which ``make docs`` calls. Nothing is downloaded.

``sources`` collects pages, notebooks and pictures, ``links`` lets them lead to each other inside of the site,
``navigation`` follows the tables in ``docs/index.md``, ``reference`` makes a page per public package.

Zensical renders: Material for MkDocs ends in May 2027 and names it as its successor.
"""
