"""The artifact: a numbered folder in which a run becomes permanent, and the desk that releases it.

    <store>/<name>/v0003/            a run whose gates passed
    <store>/<name>/rejected/r0001/   a run whose gates did not, kept with its full report
        manifest.json   written last (manifest.py)
        recipe.yaml     model/     reports/

layout, store, dedupe       where things lie; numbering and publishing; equal files share their bytes
history, lines, recovery    what happened, chained by digests; what a crash left is finished
desk, channels, allowed     promote, roll back and waive; what deploy jobs read; what may be released
waivers, signing            who answers for gates that did not pass; ssh-keygen and gpg
verify, audit               one version byte by byte; the whole store
transport, remote           push and pull; places that fsspec opens
collect, listing, diff      what may go; `compress list`; two versions side by side
attestation                 what was built from what, as an in-toto statement
"""
