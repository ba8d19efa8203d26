"use strict";
// Unpacks plotly.js, whose digest the page's policy names, and draws the figures. Makes no request.
(async () => {
  const content = (id) => document.getElementById(id).textContent;
  try {
    const packed = Uint8Array.from(atob(content("plotly-packed")), (letter) => letter.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
    // On a touch screen a finger scrolls the page; the buttons above a chart zoom.
    const touch = matchMedia("(pointer: coarse)").matches;
    const settings = {
      responsive: true,
      displaylogo: false,
      displayModeBar: touch ? true : "hover",
      modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
    };
    const plots = [];
    for (const [at, figure] of JSON.parse(content("figures")).entries()) {
      const plot = document.getElementById(`plot-${at}`);
      await Plotly.newPlot(plot, figure.data, { ...figure.layout, dragmode: touch ? false : "zoom" }, settings);
      const shape = () => {
        const { width, height } = plot._fullLayout;
        plot.style.setProperty("--shape", `${width} / ${height}`);
        for (const svg of plot.querySelectorAll(".main-svg")) svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      };
      shape();
      plot.on("plotly_afterplot", shape);
      plots.push(plot);
    }
    // A range of steps that is zoomed into in one chart is shown in all of them.
    let following = false;
    for (const plot of plots) {
      plot.on("plotly_relayout", async (change) => {
        const [first, last] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
        const reset = change["xaxis.autorange"] === true;
        if (following || (first === undefined && !reset)) return;
        following = true;
        const wanted = reset ? { "xaxis.autorange": true } : { "xaxis.range": [first, last] };
        await Promise.all(plots.filter((other) => other !== plot).map((other) => Plotly.relayout(other, wanted)));
        following = false;
      });
    }
    document.documentElement.dataset.charts = String(plots.length);
  } catch (error) {
    document.getElementById("charts-failed").hidden = false;
    document.documentElement.dataset.charts = `failed: ${error}`;
  }
})();
