"""The artifact: a numbered folder in which a run becomes permanent.

    <store>/<name>/v0003/            a run whose gates passed
    <store>/<name>/rejected/r0001/   a run whose gates did not, kept with its full report
        manifest.json   written last (manifest.py)
        recipe.yaml     model/     reports/

`store.py` numbers and publishes them, `verify.py` checks one byte by byte.
"""
