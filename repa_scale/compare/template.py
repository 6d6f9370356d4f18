"""The frame of the page: its style in light, dark and on paper. No values."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6068; --paper: #ffffff; --line: #d9dce1;
  --mark: #fff3c4; --warn: #b45309; --warn-paper: #fdf1e5; --stop: #b3261e; --stop-paper: #fdecea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e9ec; --soft: #a2a8b0; --paper: #15171a; --line: #363a40;
    --mark: #4a3f12; --warn: #f0a35e; --warn-paper: #33251a; --stop: #ff8a80; --stop-paper: #3a1c1a; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; line-height: 1.2; }
h2 { margin: 2.2rem 0 .6rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
h3 { margin: 1.4rem 0 .4rem; }
.lead { font-size: 1.3rem; line-height: 1.4; margin: 1rem 0 .4rem; }
.small, .runs, .soft { color: var(--soft); font-size: .92rem; }
.soft, .wide th { white-space: nowrap; }
.runs b { color: var(--ink); }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .45em; }
.warn { border-left: 4px solid var(--warn); padding: .35rem .8rem; background: var(--warn-paper); margin: .5rem 0; }
.refused { border: 3px solid var(--stop); background: var(--stop-paper); padding: .6rem 1.2rem; margin: 1rem 0; }
.refused strong { font-size: clamp(2rem, 8vw, 3.6rem); line-height: 1.1; color: var(--stop); letter-spacing: .02em; }
.refused p { margin: .4rem 0; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem 1.5rem; }
@media (max-width: 800px) { .grid { grid-template-columns: minmax(0, 1fr); } body { margin: 1rem auto; }
  .lead { font-size: 1.15rem; } }
figure { margin: .6rem 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
img { width: 100%; image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; min-width: 4.5em; }
td { overflow-wrap: anywhere; }
.numbers td { overflow-wrap: normal; }
.numbers th:first-child { min-width: 9em; }
th { font-weight: 500; }
tr:first-child th { font-weight: 600; }
.group th { padding-top: .8rem; font-weight: 600; }
.differs th, .differs td { background: var(--mark); }
code { font-size: .88rem; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .8rem 0; }
.chart .js-plotly-plot text { fill: var(--ink) !important; }
.chart .gridlayer path { stroke: var(--line) !important; }
.chart .zerolinelayer path { stroke: var(--soft) !important; }
.chart .errorbars path { stroke: var(--soft) !important; }
@media print {
  :root { --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --mark: #fff3c4; --warn-paper: #fff;
    --stop: #b3261e; --stop-paper: #fff; color-scheme: light; }
  body { max-width: none; margin: 0; font-size: 11pt; }
  .grid { grid-template-columns: minmax(0, 1fr); }
  figure, tr, .refused, .warn { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  details { display: none; }
  .scroll { overflow: visible; }
}
</style>
<script>{{plotly}}</script>
</head>
<body>
{{body}}
</body>
</html>
"""
