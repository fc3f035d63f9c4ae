"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themes = THEMES;
  const drawn = new Map();

  // `$name` stands for a colour, everywhere but in the data.
  const coloured = (value, theme) => {
    if (typeof value === "string") {
      return value[0] === "$" && value.slice(1) in theme ? theme[value.slice(1)] : value;
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, theme));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) => [
        key,
        key === "data" ? item : coloured(item, theme),
      ]),
    );
  };

  const config = (theme) => ({
    background: null,
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: null },
    axis: {
      domainColor: theme.line, gridColor: theme.line, tickColor: theme.line,
      labelColor: theme.text, titleColor: theme.muted, titleFontWeight: 400,
      labelFontSize: 12, titleFontSize: 12, gridOpacity: 0.7, domain: false, ticks: false,
      labelPadding: 6,
    },
    legend: {
      labelColor: theme.text, titleColor: theme.muted, titleFontWeight: 400,
      labelFontSize: 12, titleFontSize: 12, symbolType: "circle", symbolStrokeWidth: 0,
      orient: "top", padding: 0, offset: 8,
    },
    text: { color: theme.text },
  });

  const specs = [...document.querySelectorAll("script.spec")];
  let failures = 0;

  const draw = async (script) => {
    const place = document.getElementById(script.dataset.for);
    // What is within a closed part is drawn once that is opened.
    if (!place || place.closest("details.part:not([open])")) return;
    const width = place.clientWidth;
    const theme = dark.matches ? themes.dark : themes.light;
    const spec = coloured(JSON.parse(script.textContent), theme);
    // Long names must leave room for what is drawn.
    spec.config = {
      ...spec.config,
      axisY: { titlePadding: 8, labelLimit: Math.min(400, 0.36 * width) },
    };
    const known = drawn.get(place);
    if (known) known.finalize();
    const own = spec.config || {};
    spec.config = {};
    try {
      const result = await vegaEmbed(place, spec, {
        mode: "vega-lite", renderer: "svg", actions: false, ast: true,
        config: { ...config(theme), ...own },
        tooltip: { theme: dark.matches ? "dark" : "light" },
      });
      drawn.set(place, result);
      place.dataset.drawn = "yes";
      const svg = place.querySelector("svg");
      if (svg) {
        svg.setAttribute("role", "img");
        svg.setAttribute("aria-label", place.dataset.label);
      }
    } catch (error) {
      failures += 1;
      place.textContent = "This plot could not be drawn; the table below says the same.";
      console.error(error);
    }
  };

  const pause = () => new Promise((resolve) => setTimeout(resolve, 0));

  const drawAll = async (redraw) => {
    if (typeof vegaEmbed === "undefined") return;
    for (const script of specs) {
      const place = document.getElementById(script.dataset.for);
      if (redraw || !drawn.has(place)) {
        await draw(script);
        // What is above is seen while what is below is drawn.
        await pause();
      }
    }
    document.documentElement.dataset.drawn = String(drawn.size);
    document.documentElement.dataset.failed = String(failures);
    // For whoever measures: milliseconds until it was loaded, and until all was drawn.
    const [opened] = performance.getEntriesByType("navigation");
    document.documentElement.dataset.loaded = String(Math.round(opened ? opened.loadEventEnd : 0));
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  };

  dark.addEventListener("change", () => drawAll(true));
  for (const part of document.querySelectorAll("details.part")) {
    part.addEventListener("toggle", () => drawAll(false));
  }
  const openTarget = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  };
  addEventListener("hashchange", openTarget);
  openTarget();
  let width = innerWidth, later = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(later);
    later = setTimeout(() => drawAll(true), 200);
  });
  // The words come first.
  requestAnimationFrame(() => setTimeout(() => drawAll(false), 0));

  // Served by `arm-ray serve`: ask whether there is something new, and show it where we are.
  const live = document.getElementById("live");
  if (live) {
    let version = null;
    const ask = async () => {
      try {
        const answer = await (await fetch("version", { cache: "no-store" })).json();
        if (version !== null && answer.version !== version) {
          sessionStorage.setItem("at", String(scrollY));
          location.reload();
          return;
        }
        version = answer.version;
        live.textContent = `Live: ${answer.status}`;
      } catch {
        live.textContent = "The server has ended; this is what it showed last.";
      }
      setTimeout(ask, 2000);
    };
    const at = sessionStorage.getItem("at");
    if (at !== null) {
      sessionStorage.removeItem("at");
      scrollTo(0, Number(at));
    }
    ask();
  }
})();
