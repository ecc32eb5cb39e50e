"""The page's style sheet: one file, light and dark, from a phone to a wide screen.

The colours are Okabe and Ito's, which stay apart for all common kinds of colour blindness.
"""

__all__ = ["STYLE"]

STYLE = """
:root{
  color-scheme:light dark; --paper:#fff; --panel:#f7f7f5; --ink:#1b1c1e; --soft:#5c6066; --rule:#dcdcd8;
  --for:213 94 0; --against:0 114 178; --guard:#0072b2; --tfidf:#d55e00; --length:#007a5a; --random:#6b6f76;
  --shuffled:#a8487f; --breach:#b34700; --suspect:#8a6100; --clear:#00684d
}
@media (prefers-color-scheme:dark){
  :root{
    --paper:#141517; --panel:#1d1f22; --ink:#e9e9e6; --soft:#a3a7ad; --rule:#35383d; --for:232 110 22;
    --against:30 136 205; --guard:#56b4e9; --tfidf:#f08a3c; --length:#3fc79a; --random:#a3a7ad;
    --shuffled:#dd8fbd; --breach:#ff9a57; --suspect:#e9c04f; --clear:#4fd1a5
  }
}
*{box-sizing:border-box}
body{
  margin:0; background:var(--paper); color:var(--ink);
  font:16px/1.55 system-ui,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans","DejaVu Sans",sans-serif;
  font-variant-numeric:tabular-nums; -webkit-text-size-adjust:100%
}
main{max-width:1180px;margin:0 auto;padding:56px 32px 72px}
h1,h2,h3,h4,p,dl,dd,ol,ul,figure{margin:0}
h1{font-size:40px;line-height:1.15;letter-spacing:-.02em;font-weight:680}
h2{font-size:25px;line-height:1.25;letter-spacing:-.01em;font-weight:650;margin-bottom:12px}
h3{
  font-size:17px; font-weight:600; display:flex; flex-wrap:wrap; gap:6px 14px; align-items:center;
  overflow-wrap:anywhere
}
h4{font-size:13px;font-weight:600;color:var(--soft);margin:0 0 6px}
section,footer{margin-top:72px}
section>p{max-width:72ch}
.quiet{color:var(--soft);font-size:13.5px}
.brand{font-weight:600;color:var(--soft);margin-bottom:4px}
.summary{font-size:21px;line-height:1.45;max-width:58ch;margin-top:20px;text-wrap:pretty}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:18px 32px}
header dl{margin-top:36px;padding-top:24px;border-top:1px solid var(--rule)}
dt{color:var(--soft);font-size:13.5px}
dd{overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:8px 12px;align-items:center;margin:20px 0 28px;font-size:14px}
.ramp{
  width:150px; height:14px; border-radius:3px; border:1px solid var(--rule);
  background:linear-gradient(90deg,rgb(var(--against)/.72),
    rgb(var(--against)/0) 50%,rgb(var(--for)/0) 50%,rgb(var(--for)/.72))
}
article{padding:26px 0 34px;border-top:1px solid var(--rule)}
.label{font-weight:400;color:var(--soft);font-size:14.5px}
.badge{
  display:inline-flex; gap:7px; align-items:center; border:1.5px solid; border-radius:999px;
  padding:1px 13px 2px 10px; font-size:14.5px; font-weight:650
}
.badge.breach{color:var(--paper);background:var(--breach);border-color:var(--breach)}
.badge.suspect{color:var(--suspect)}
.badge.clear{color:var(--clear)}
.track{display:grid;grid-template-columns:minmax(0,1fr) 416px;gap:20px 48px;margin-top:18px}
.part+.part{margin-top:22px;padding-top:18px;border-top:1px dashed var(--rule)}
.track .quiet{margin-top:14px}
.tokens{font-size:16.5px;line-height:2.05;white-space:pre-wrap;overflow-wrap:anywhere;max-width:66ch}
.t{padding:3px 0;border-radius:2px;unicode-bidi:isolate}
.t i{font-style:normal;color:var(--soft);font-size:.8em}
.tokens .t:hover{outline:1.5px solid var(--ink)}
.for{background:rgb(var(--for)/var(--a))}
.against{background:rgb(var(--against)/var(--a))}
.unscored{color:var(--soft)}
.suspected{text-decoration:underline dotted 2px;text-underline-offset:5px}
.breached{text-decoration:underline solid 2.5px;text-underline-offset:5px}
.facts{grid-template-columns:repeat(4,auto);gap:4px 18px;justify-content:space-between}
.facts dd{font-weight:600}
aside figure{margin-top:14px}
.part~h4{margin-top:20px}
figcaption{margin-top:10px}
.strongest{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14.5px}
.strongest q{quotes:"“" "”"}
.strongest b{font-weight:600}
details{margin-top:18px}
summary{cursor:pointer;color:var(--soft)}
.pair{
  display:grid; grid-template-columns:minmax(0,540px) minmax(0,1fr); gap:28px 44px; margin-top:22px;
  align-items:start
}
.pair p{margin-top:16px}
svg{display:block;width:100%;height:auto;overflow:visible;font-size:12.5px}
svg text{fill:var(--soft)}
svg .middle{text-anchor:middle}
svg .end{text-anchor:end}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke:var(--soft)}
.dot{fill:var(--soft)}
.marker{stroke:var(--soft);stroke-dasharray:2 4}
rect.void{fill:var(--panel)}
line.breach{stroke:var(--breach);stroke-width:1.8}
line.suspect{stroke:var(--suspect);stroke-width:1.8;stroke-dasharray:6 4}
svg text.breach,svg text.suspect{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
svg text.breach{fill:var(--breach)}
svg text.suspect{fill:var(--suspect)}
.line.readout{stroke:var(--ink);stroke-width:2.2}
.dot.readout{fill:var(--ink)}
.s-guard{stroke:var(--guard);border-color:var(--guard)}
.line.s-guard{stroke-width:3.2}
.s-tfidf{stroke:var(--tfidf);border-color:var(--tfidf);stroke-dasharray:7 4}
.s-length{stroke:var(--length);border-color:var(--length);stroke-dasharray:2 4}
.s-random_direction{stroke:var(--random);border-color:var(--random);stroke-dasharray:10 3 2 3}
.s-shuffled_labels{stroke:var(--shuffled);border-color:var(--shuffled);stroke-dasharray:4 3}
svg .t-guard{fill:var(--guard);font-weight:650}
svg .t-tfidf{fill:var(--tfidf)}
svg .t-length{fill:var(--length)}
svg .t-random_direction{fill:var(--random)}
svg .t-shuffled_labels{fill:var(--shuffled)}
.key{
  display:inline-block; width:22px; margin-right:9px; border-top-width:3px; border-top-style:dashed;
  vertical-align:middle
}
.key.s-guard{border-top-style:solid}
.key.s-length{border-top-style:dotted}
.f-0{stroke:var(--guard)}
.f-1{stroke:var(--tfidf);stroke-dasharray:7 4}
.f-2{stroke:var(--length)}
.f-3{stroke:var(--shuffled)}
.f-4{stroke:var(--suspect)}
.f-5{stroke:var(--random)}
.f-6{stroke:var(--ink)}
.f-7{stroke:var(--breach)}
.dot[class*=f-]{fill:var(--paper);stroke-width:2;stroke-dasharray:none}
.dot.chosen{fill:var(--guard)}
.pair h4{margin-bottom:10px}
svg .k-0{fill:var(--guard)}
svg .k-1{fill:var(--tfidf)}
svg .k-2{fill:var(--length)}
svg .k-3{fill:var(--shuffled)}
svg .k-4{fill:var(--suspect)}
svg .k-5{fill:var(--random)}
svg .k-6{fill:var(--ink)}
svg .k-7{fill:var(--breach)}
.scroll{overflow-x:auto}
section>.scroll{margin-top:18px}
table{border-collapse:collapse;font-size:14.5px;width:100%}
th{
  font-weight:600; color:var(--soft); text-align:right; vertical-align:bottom; padding:6px 0 8px 20px;
  border-bottom:1px solid var(--soft)
}
td{text-align:right;padding:7px 0 7px 20px;white-space:nowrap;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{text-align:left;padding-left:0}
tr.lead td{font-weight:650}
section>.scroll td:nth-child(2),section>.scroll th:nth-child(2){text-align:left}
tr.first td{border-bottom-color:transparent}
.bars{list-style:none;padding:0;font-size:14.5px}
.bars li{
  display:grid; grid-template-columns:minmax(0,1fr) minmax(80px,42%) 52px; gap:14px; align-items:center;
  padding:5px 0
}
.bars b{text-align:right;font-weight:600}
.bar{background:var(--panel);height:12px;border-radius:2px}
.bar span{display:block;height:100%;background:var(--soft);border-radius:2px}
.chosen .bar span{background:var(--guard)}
.limits ul{padding-left:20px;max-width:76ch}
.limits li{margin-top:10px}
footer{color:var(--soft);font-size:14px;border-top:1px solid var(--rule);padding-top:18px}
@media (max-width:980px){
  .track,.pair{grid-template-columns:minmax(0,1fr)}
  .track aside{max-width:560px}
}
@media (max-width:560px){
  main{padding:32px 18px 48px}
  h1{font-size:32px}
  .summary{font-size:18.5px}
  section,footer{margin-top:56px}
  dl{grid-template-columns:1fr;gap:12px}
  .facts{grid-template-columns:repeat(2,1fr)}
  svg{font-size:14px}
  .bars li{grid-template-columns:minmax(0,1fr) 80px 50px}
}
@media print{
  article{break-inside:avoid}
}
"""
