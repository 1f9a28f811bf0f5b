"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const picture = document.getElementById("picture");
  const detail = document.getElementById("detail");
  let pinned = 0;

  const element = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const number = (value) => (Math.abs(value) < 5e-5 ? "0" : value.toPrecision(3));
  const signed = (value) => (value > 0 ? "+" : "") + number(value);

  function table(title, lines) {
    if (!lines.length) return [];
    const made = element("table");
    for (const [name, value, kind] of lines) {
      const row = element("tr");
      row.append(element("td", name), element("td", value, kind));
      made.append(row);
    }
    return [element("h3", title), made];
  }

  function chips(title, texts) {
    if (!texts.length) return [];
    const made = element("div", undefined, "chips");
    made.append(...texts.map((text) => element("span", text, "chip")));
    return [element("h3", title), made];
  }

  function show(chosen) {
    const node = data.nodes[chosen];
    const into = data.edges.filter((edge) => edge[1] === chosen).sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
    const out = data.edges.filter((edge) => edge[0] === chosen).sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
    const line = (place) => (edge) => [data.nodes[edge[place]].name, signed(edge[2]), edge[2] < 0 ? "minus" : "plus"];
    const figures = [[data.ending === "influence" ? "value" : "contributes to the root", number(node.value)]];
    if (node.activation !== null) figures.push(["fires with", number(node.activation)]);
    if (node.influence !== null) figures.push(["influence on the root", number(node.influence)]);
    const parts = into.map(line(0));
    if (node.pruned !== null) parts.push(["pruned", signed(node.pruned), "rest"]);
    detail.replaceChildren(
      element("h2", node.name),
      ...table("Figures", figures),
      ...chips("Promotes", node.promotes),
      ...chips("Excited directly by", node.excited),
      ...table("Is the sum of", parts),
      ...table("Contributes to", out.map(line(1))),
    );
    const near = new Set([chosen, ...into.map((edge) => edge[0]), ...out.map((edge) => edge[1])]);
    for (const each of picture.querySelectorAll(".node")) each.classList.toggle("near", near.has(Number(each.dataset.node)));
    for (const each of picture.querySelectorAll(".edge")) {
      each.classList.toggle("near", Number(each.dataset.child) === chosen || Number(each.dataset.parent) === chosen);
    }
  }

  const at = (event) => {
    const found = event.target.closest(".node");
    return found ? Number(found.dataset.node) : null;
  };
  picture.addEventListener("mouseover", (event) => {
    const place = at(event);
    if (place !== null) { show(place); picture.classList.add("chosen"); }
  });
  picture.addEventListener("focusin", (event) => {
    const place = at(event);
    if (place !== null) show(place);
  });
  picture.addEventListener("mouseleave", () => { show(pinned); picture.classList.toggle("chosen", pinned !== 0); });
  picture.addEventListener("click", (event) => {
    pinned = at(event) ?? 0;
    show(pinned);
    picture.classList.toggle("chosen", pinned !== 0);
  });
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  show(0);
})();
