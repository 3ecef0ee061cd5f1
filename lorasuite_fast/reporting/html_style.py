"""The style sheet of a report."""

from __future__ import annotations

STYLE = """
.lsf{--ink:#1b1f24;--paper:#fff;--soft:#f3f5f7;--rule:#d0d7de;--dim:#57606a;--a:#0b5cad;--b:#b3470b;--on:#fff;
--good:#116329;--part:#7d4e00;--bad:#a40e26;color:var(--ink);background:var(--paper);line-height:1.5;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;font-size:16px}
@media (prefers-color-scheme:dark){.lsf{--ink:#e6edf3;--paper:#0d1117;--soft:#161b22;--rule:#3d444d;--dim:#9aa4af;
--a:#6cb6ff;--b:#ff9d5c;--on:#0d1117;--good:#57d272;--part:#e3b341;--bad:#ff8a80}}
.lsf *{box-sizing:border-box}
.lsf h1{font-size:1.5rem;line-height:1.25;margin:0 0 .75rem;overflow-wrap:anywhere}
.lsf h2{font-size:1.15rem;margin:2rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--rule)}
.lsf p{max-width:44rem}
.lsf svg{display:block;width:100%;max-width:560px;height:auto}
.lsf .key svg{display:inline-block;width:30px;height:8px;vertical-align:middle}
.lsf svg text{fill:var(--ink);font-size:11px;font-family:inherit}
.lsf svg .value{font-size:10px}.lsf svg .value.on{fill:var(--on)}
.lsf .plus{fill:var(--a)}.lsf .minus{fill:var(--b)}.lsf .none{fill:none;stroke:var(--rule);stroke-dasharray:2 2}
.lsf .path{fill:none;stroke:var(--b);stroke-linejoin:round}
.lsf .chosen{fill:none;stroke:var(--b)}
.lsf line.grid{stroke:var(--rule);stroke-width:.5}
.lsf line.mark{stroke:var(--b);stroke-width:1;stroke-dasharray:3 2}
.lsf .line{fill:none;stroke-width:1.5}.lsf .line.a{stroke:var(--a)}.lsf .line.b{stroke:var(--b);stroke-dasharray:4 3}
.lsf .dot.a{fill:var(--a)}.lsf .dot.b{fill:var(--b)}
.lsf .bar{fill:var(--a)}.lsf .track{fill:var(--soft)}
.lsf figure{margin:0 0 1rem}
.lsf figcaption,.lsf caption{color:var(--dim);font-size:.875rem;text-align:left;max-width:44rem;padding:.25rem 0}
.lsf .panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 1.5rem}
.lsf table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;margin:.5rem 0 1rem;
color:inherit}
.lsf td,.lsf th{padding:.2rem .6rem .2rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule);
overflow-wrap:anywhere;background:none;font-weight:400}
.lsf thead th{font-weight:600}.lsf th,.lsf .fit td{overflow-wrap:normal}
.lsf .wide{overflow-x:auto;max-width:100%}.lsf .wide th,.lsf .wide td{overflow-wrap:normal}
.lsf dl{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.4rem 1.5rem;margin:.5rem 0 1rem}
.lsf dt{color:var(--dim);font-size:.8125rem}.lsf dd{margin:0;overflow-wrap:anywhere}
.lsf .verdict{border-left:4px solid;padding:.4rem .8rem;background:var(--soft)}
.lsf .good{border-color:var(--good)}.lsf .part{border-color:var(--part)}.lsf .bad{border-color:var(--bad)}
.lsf .key{list-style:none;padding:0;margin:.25rem 0;display:flex;gap:1.25rem;font-size:.875rem}
.lsf summary{cursor:pointer;color:var(--a);font-size:.875rem}
.lsf a{color:var(--a)}
.lsf :focus-visible{outline:2px solid var(--b);outline-offset:2px}
"""


PAGE_STYLE = """
html{background:#fff}@media (prefers-color-scheme:dark){html{background:#0d1117}}
body{margin:0}.lsf{max-width:60rem;margin:0 auto;padding:1.25rem 1rem 3rem}
.lsf nav ul{list-style:none;padding:0;margin:0 0 1rem;display:flex;flex-wrap:wrap;gap:.25rem 1rem}
.lsf main:focus{outline:none}
.skip{position:absolute;left:-999rem}.skip:focus{left:1rem;top:.5rem;background:#fff;color:#0b5cad;padding:.3rem .6rem}
footer{margin-top:2rem;font-size:.8125rem;color:var(--dim)}
@media (max-width:30rem){.lsf .fit td,.lsf .fit th{padding-right:.35rem;font-size:.78rem}}
@media print{.lsf{--ink:#000;--paper:#fff;--soft:#eee;--rule:#bbb;--dim:#333;--a:#0b5cad;--b:#b3470b;--on:#fff;
--good:#116329;--part:#7d4e00;--bad:#a40e26;max-width:none;padding:0;font-size:11pt}
html{background:#fff}.lsf svg{max-width:420px}.lsf nav,.skip,.lsf details:not([open]){display:none}
.lsf figure,.lsf tr,.lsf .verdict{break-inside:avoid}.lsf h2{break-after:avoid}
.lsf *{print-color-adjust:exact;-webkit-print-color-adjust:exact}@page{margin:15mm}}
"""
