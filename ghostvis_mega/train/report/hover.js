"use strict";
for (const figure of document.querySelectorAll("figure.chart")) {
  const source = figure.querySelector('script[type="application/json"]');
  if (!source) continue;
  const data = JSON.parse(source.textContent);
  const plot = figure.querySelector(".plot");
  const tip = figure.querySelector(".tip");
  const cursor = figure.querySelector(".cursor");
  const width = plot.querySelector("svg").viewBox.baseVal.width;

  const nearest = (fraction) => {
    let best = 0;
    data.x.forEach((x, i) => {
      if (Math.abs(x - fraction) < Math.abs(data.x[best] - fraction)) best = i;
    });
    return best;
  };

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const i = nearest((event.clientX - box.left) / box.width);
    const lines = ["step " + data.step[i]];
    for (const series of data.series) lines.push(series.name + "  " + series.text[i]);
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const rightHalf = data.x[i] > 0.5;
    tip.style.left = rightHalf ? "auto" : data.x[i] * 100 + 2 + "%";
    tip.style.right = rightHalf ? 100 - data.x[i] * 100 + 2 + "%" : "auto";
    cursor.setAttribute("x1", data.x[i] * width);
    cursor.setAttribute("x2", data.x[i] * width);
    cursor.classList.add("on");
  });
  plot.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.classList.remove("on");
  });
}
