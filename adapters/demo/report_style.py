"""The style sheet of the report: one page, light and dark, no external resource.

html = f"<style>{STYLE}</style>"
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfbfa; --panel: #ffffff; --ink: #1d2127; --faint: #646c77; --rule: #e1e3e6; --lane: #f2f3f5;
  --good: #17713a; --good-ground: #e4f4e9; --bad: #a3201a; --bad-ground: #fbe7e5; --number: #ffffff;
  --p0: #7d8794; --p1: #3b6fb6; --p2: #c2571a; --p3: #7a52a8; --p4: #1b8a84;
  --p5: #a8851a; --p6: #b53d78; --p7: #4d8a34; --p8: #5763c9; --p9: #8a5a3c;
  --p10: #a33f4c; --p11: #5f7466; --p12: #2f4f7f; --p13: #9a7fb5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --panel: #1c2026; --ink: #e6e8eb; --faint: #9aa3ae; --rule: #31373f; --lane: #252a31;
    --good: #7fd69a; --good-ground: #173422; --bad: #ff9a92; --bad-ground: #421d1b; --number: #0f1215;
    --p0: #929ca8; --p1: #78a9ea; --p2: #ee9560; --p3: #b894e0; --p4: #5cc4bd;
    --p5: #d9b855; --p6: #ea83b2; --p7: #8cc873; --p8: #9aa3f5; --p9: #c99a7b;
    --p10: #e88b95; --p11: #a4b9a9; --p12: #5f86c9; --p13: #d6c1ea;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 40px 0 10px; }
p { margin: 0 0 12px; max-width: 100ch; }
.faint { color: var(--faint); }
.verdict { padding: 12px 16px; border-radius: 8px; margin: 20px 0; font-weight: 500; }
.verdict ul { margin: 4px 0 0; padding-left: 20px; font-weight: 400; }
.good { background: var(--good-ground); color: var(--good); }
.bad { background: var(--bad-ground); color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(166px, 1fr)); gap: 12px; }
.tile { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 18px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { color: var(--faint); font-size: 13px; }
.scroll { overflow-x: auto; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: 13px; }
tr:last-child td { border-bottom: 0; }
.answers { table-layout: fixed; }
.answers th, .answers td { text-align: left; vertical-align: top; white-space: normal; }
.answers td:nth-child(2) { overflow-wrap: anywhere; }
.answers .who { width: 220px; }
.answers .badge { width: 190px; }
.prompt td { background: var(--lane); }
code { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.ids { color: var(--faint); font: 12px/1.5 ui-monospace, monospace; }
.ids mark { background: var(--bad-ground); color: var(--bad); border-radius: 2px; }
.plain { background: var(--lane); }
.tag { display: inline-block; padding: 1px 9px; border-radius: 9px; font-size: 13px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 6px 18px; padding: 0; margin: 12px 0 0; }
.legend li { display: flex; align-items: center; gap: 6px; font-size: 13px; }
.timeline { display: block; font: 12px system-ui, sans-serif; }
.timeline .lane { fill: var(--lane); }
.timeline .grid { stroke: var(--rule); }
.timeline .tick { fill: var(--faint); }
.timeline .process { fill: var(--ink); }
.timeline .number { fill: var(--number); font-size: 11px; pointer-events: none; }
.timeline g:hover rect { stroke: var(--ink); stroke-width: 1.5; }
.p0 { fill: var(--p0); } .p1 { fill: var(--p1); } .p2 { fill: var(--p2); } .p3 { fill: var(--p3); }
.p4 { fill: var(--p4); } .p5 { fill: var(--p5); } .p6 { fill: var(--p6); } .p7 { fill: var(--p7); }
.p8 { fill: var(--p8); } .p9 { fill: var(--p9); } .p10 { fill: var(--p10); } .p11 { fill: var(--p11); }
.p12 { fill: var(--p12); } .p13 { fill: var(--p13); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 0; }
.facts dt { color: var(--faint); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: 3fr 2fr; gap: 32px; }
@media (max-width: 800px) { .columns { grid-template-columns: 1fr; } }
"""
