"use strict";
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const colors = ["#2f7ed8", "#e8710a", "#1a9850", "#d6336c", "#8456ce", "#9a6b4f", "#00a3a3", "#b5a000"];
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const several = runs.length > 1;
  // A closed list of buttons: the default ones include one that sends the data to Plotly's server.
  const buttons = [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
  const config = { responsive: true, displaylogo: false, displayModeBar: "hover", plotlyServerURL: "", modeBarButtons: buttons };
  const color = (i) => colors[i % colors.length];
  // Plotly reads names as HTML.
  const text = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const div = (i) => document.getElementById(`chart-${i}`);
  let axis = "step", smoothing = 0, printing = false;

  // An exponential moving average that starts without bias (Kingma and Ba 2015, section 3).
  function smoothed(values) {
    let sum = 0, weight = 0;
    return values.map((value) => {
      sum = smoothing * sum + (1 - smoothing) * value;
      weight = smoothing * weight + (1 - smoothing);
      return sum / weight;
    });
  }

  function trace(curve) {
    const judged = curve.side === "eval", points = judged || curve.y.length === 1;
    return {
      x: curve[axis], y: judged ? curve.y : smoothed(curve.y), type: "scatter", mode: points ? "lines+markers" : "lines",
      name: text(several ? `${runs[curve.run]} (${curve.side})` : curve.side),
      opacity: several && !judged ? 0.55 : 1,
      line: {
        color: color(several ? curve.run : judged ? 1 : 0), width: judged ? 2 : 1.3,
        dash: several ? dashes[Math.floor(curve.run / colors.length) % dashes.length] : "solid",
      },
      marker: { size: 5 },
    };
  }

  function colorsOf() {
    const night = dark.matches && !printing, line = night ? "#353d46" : "#d8dee4";
    const one = { gridcolor: line, zerolinecolor: line, linecolor: line };
    return { ink: night ? "#e4e8ec" : "#1d2329", ground: night ? "#14181c" : "#ffffff", one };
  }

  // Plotly draws a constant on an axis from -1 to 1, on which a learning rate cannot be read.
  function rangeOf(curves) {
    const [first, ...rest] = curves.flatMap((curve) => curve.y);
    return first && rest.every((value) => value === first) ? { range: [first - Math.abs(first) / 2, first + Math.abs(first) / 2] } : {};
  }

  function layout(i) {
    const { ink, ground, one } = colorsOf(), log = document.querySelector(`[data-log="${i}"]`).checked;
    return {
      margin: { l: 52, r: 12, t: 26, b: 40 }, paper_bgcolor: ground, plot_bgcolor: ground,
      font: { color: ink, size: 11, family: "system-ui, sans-serif" }, hovermode: "x unified", dragmode: "zoom",
      hoverlabel: { bgcolor: ground, font: { color: ink } }, separators: ".,",
      xaxis: { title: { text: axis === "step" ? "update" : "tokens" }, rangemode: "tozero", ...one },
      yaxis: { type: log ? "log" : "linear", exponentformat: "SI", ...one, ...(log ? {} : rangeOf(charts[i].curves)) },
      showlegend: !several && charts[i].curves.length > 1,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
      ...(printing ? { width: 340, height: 200 } : { autosize: true }),
    };
  }

  function shown(curve) {
    return !several || document.querySelector(`[data-run="${curve.run}"]`).checked;
  }

  function draw() {
    return Promise.all(charts.map((chart, i) => Plotly.react(
      div(i), chart.curves.filter(shown).map(trace), layout(i),
      config,
    )));
  }

  function failed(error) {
    const problem = document.getElementById("problem");
    problem.textContent = `The plots cannot be drawn: ${error}`;
    problem.hidden = false;
    throw error;
  }

  document.querySelectorAll(".swatch").forEach((swatch, i) => { swatch.style.background = color(i); });
  document.querySelectorAll("[data-run], [data-log]").forEach((box) => box.addEventListener("change", draw));
  document.getElementById("axis").addEventListener("change", (event) => { axis = event.target.value; draw(); });
  document.getElementById("smoothing").addEventListener("input", (event) => { smoothing = Number(event.target.value); draw(); });
  dark.addEventListener("change", draw);
  addEventListener("beforeprint", () => { printing = true; draw(); });
  addEventListener("afterprint", () => { printing = false; draw(); });
  draw().catch(failed);
})();
