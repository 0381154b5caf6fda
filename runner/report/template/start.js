// Everything is set up once, drawn, and drawn again when the width of the page changes.
setUpColours();
setUpCurves();
setUpFrontiers();
setUpTable();
if (runs.length === 1) pick(0);
else draw();
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone hides its address bar while one scrolls
  width = innerWidth;
  draw();
});
