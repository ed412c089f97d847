"""From text to statistics: descriptors -> documents -> token windows -> the block walk -> Hessians.

texts            where documents come from (hub sets, local files, Python's own text, the model itself)
windows          documents -> packed or padded token windows, with a ledger of what was asked for and obtained
overlap          shared n-grams between calibration and evaluation windows
walk             the block walk: one block resident, statistics and solving inside one forward pass
"""
