// Charts: choice of the figure, a legend that hides and shows series, and the text of the point under the pointer, the
// finger or the keys. Without this script, all figures and the legend are shown.
for (const chart of document.querySelectorAll(".chart")) {
  const tip = chart.querySelector(".tip"), figures = [...chart.querySelectorAll("figure")];
  const choices = [...chart.querySelectorAll("[data-figure]")], legend = [...chart.querySelectorAll("button[data-series]")];
  const hint = "Point at a chart, tap it, or select it with Tab and use the arrow keys.";
  tip.textContent = hint;

  const choose = (wanted) => {
    figures.forEach((figure) => { figure.hidden = figure !== wanted; });
    choices.forEach((button) => button.setAttribute("aria-pressed", button.dataset.figure === wanted.id));
  };
  const follow = (event) => {
    if (event && !location.hash.startsWith("#?")) return; // a link within the page keeps the choice
    const name = location.hash.startsWith("#?") && new URLSearchParams(location.hash.slice(2)).get(chart.id);
    const found = figures.find((figure) => figure.dataset.choice === name);
    choose(found ?? figures[0]);
    if (found) chart.scrollIntoView();
  };
  for (const button of choices) {
    button.addEventListener("click", () => {
      const figure = document.getElementById(button.dataset.figure);
      choose(figure);
      state.set(chart.id, figure.dataset.choice); // beside the state of the tables
      history.replaceState(null, "", `#?${state}`);
    });
  }
  if (figures.length > 1) {
    chart.querySelector(".choice").hidden = false;
    addEventListener("hashchange", follow);
    follow();
  }

  const marks = (series) => chart.querySelectorAll(`svg [data-series="${series}"]`);
  const all = chart.querySelector("[data-all]"), isOn = (button) => button.getAttribute("aria-pressed") === "true";
  const show = (button, on) => {
    button.setAttribute("aria-pressed", on);
    marks(button.dataset.series).forEach((mark) => mark.classList.toggle("off", !on));
    all.textContent = legend.some(isOn) ? "Hide all" : "Show all";
  };
  const light = (series) => {
    chart.querySelectorAll(".plot").forEach((svg) => svg.classList.toggle("dim", series !== null));
    chart.querySelectorAll(".near").forEach((mark) => mark.classList.remove("near"));
    if (series !== null) marks(series).forEach((mark) => mark.classList.add("near"));
  };
  for (const button of legend) {
    button.disabled = false;
    button.addEventListener("click", () => show(button, !isOn(button)));
    for (const [event, on] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]]) {
      button.addEventListener(event, () => light(on && isOn(button) ? button.dataset.series : null));
    }
  }
  all.hidden = false;
  all.addEventListener("click", () => {
    const on = !legend.some(isOn); // "Show all" leaves out what was hidden at first
    legend.forEach((button) => show(button, on && !button.closest(".more")));
  });
  chart.querySelectorAll(".more").forEach((more) => { more.hidden = false; });

  // A spot is a place with a text: a symbol, a part of a bar, or each point of a curve.
  const spotsOf = (mark) => {
    const text = mark.querySelector("title").textContent, at = mark.dataset.at?.split("|");
    if (mark.localName === "rect") {
      const [x, y, width, height] = ["x", "y", "width", "height"].map((name) => Number(mark.getAttribute(name)));
      return [{ mark, text, x: x + width / 2, y: y + height / 2 }];
    }
    const places = [...mark.getAttribute("d").matchAll(/[ML]([\d.]+) ([\d.]+)/g)];
    const name = at && legend.find((button) => button.dataset.series === mark.dataset.series).textContent.trim();
    return places.map(([, x, y], i) => ({ mark, text: at ? `${name}, step ${at[i]}` : text, x: Number(x), y: Number(y) }));
  };
  const rowOf = (spot) => spot?.mark.closest("a")?.getAttribute("href");
  for (const svg of chart.querySelectorAll(".plot")) {
    const spots = [...svg.querySelectorAll(".spot")].flatMap(spotsOf);
    svg.querySelectorAll(".spot > title").forEach((title) => { // the browser would show it, too
      title.closest("a")?.setAttribute("aria-label", title.textContent);
      title.remove();
    });
    spots.sort((a, b) => a.mark.dataset.series - b.mark.dataset.series || a.x - b.x || a.y - b.y);
    const cursor = document.createElementNS(svg.namespaceURI, "circle");
    cursor.setAttribute("class", "cursor off");
    cursor.setAttribute("r", 7.5);
    svg.append(cursor);
    let current = null;
    const select = (spot) => {
      current = spot;
      cursor.classList.toggle("off", !spot);
      light(spot?.mark.dataset.series ?? null);
      if (!spot) return;
      cursor.setAttribute("cx", spot.x);
      cursor.setAttribute("cy", spot.y);
      tip.replaceChildren(spot.text);
      if (!rowOf(spot)) return;
      const link = document.createElement("a");
      link.href = rowOf(spot);
      link.textContent = "Row in the table";
      tip.append(" ", link);
    };
    const visible = () => spots.filter((spot) => !spot.mark.classList.contains("off"));
    const nearest = (event) => {
      const own = event.target.closest?.("rect.spot");
      if (own) return spots.find((spot) => spot.mark === own);
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const distance = (spot) => Math.hypot(spot.x - at.x, spot.y - at.y);
      const found = visible().reduce((best, spot) => (!best || distance(spot) < distance(best) ? spot : best), null);
      return found && distance(found) < 32 ? found : null;
    };
    svg.tabIndex = 0;
    svg.addEventListener("pointermove", (event) => select(nearest(event)));
    svg.addEventListener("pointerdown", (event) => select(nearest(event)));
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") select(null); });
    svg.addEventListener("blur", () => select(null));
    // A tap only shows the text of a point; the link is in that text.
    svg.addEventListener("click", (event) => { if (event.pointerType === "touch") event.preventDefault(); });
    svg.addEventListener("keydown", (event) => {
      const shown = visible(), i = shown.indexOf(current), series = (spot) => spot.mark.dataset.series;
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], jump = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (event.key === "Enter" && rowOf(current)) location.hash = rowOf(current);
      else if (event.key === "Escape") select(null);
      else if (!shown.length || !(step || jump)) return;
      else if (i < 0) select(shown[0]);
      else if (step) select(shown[(i + step + shown.length) % shown.length]);
      else {
        const names = [...new Set(shown.map(series))], to = names[(names.indexOf(series(current)) + jump + names.length) % names.length];
        select(shown.find((spot) => series(spot) === to));
      }
      event.preventDefault();
    });
  }
}
