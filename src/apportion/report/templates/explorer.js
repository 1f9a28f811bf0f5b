// Following a feature's value through a prompt; `page` is in page.js.
(() => {
  const { byId, make, number, unpack, write, digits, kept, setTheme, nextTheme } = page;

  let about;
  const prompts = []; // { prompt, tokens, features: [{ firing, shown: [node] }] }
  // What is shown: a prompt, a token of it, a feature on it (by its place in the list), and the way down from there.
  const state = { prompt: 0, position: 0, feature: 0, path: [] };

  const text = () => prompts[state.prompt];
  const onToken = () => text().features[state.position];
  const root = () => onToken().shown[state.feature];

  // ---- words ----------------------------------------------------------------------------------------------------

  const signed = (value) => (value > 0 ? "+" : "") + digits(value);
  const chip = (word) => write(make("span", "chip"), word, true);
  const tokenChip = (position) => chip(text().tokens[position]);

  // The name of a node as nodes: short words and chips.
  function nameOf(node) {
    const plain = (words) => make("span", "plain", words);
    const of = node.site && node.site !== about.site ? ` of ${node.site}` : "";
    switch (node.kind) {
      case "feature":
        return [plain(`feature ${node.feature}${of}`), ...(node.says ?? []).slice(0, 2).map(chip)];
      case "source":
        return [tokenChip(node.position), plain(`token ${node.position}`)];
      case "embedding":
        return [plain("embedding of"), tokenChip(node.position)];
      case "attention":
        return [plain(`heads of layer ${node.layer}`)];
      case "mlp":
        return [plain(`MLP of layer ${node.layer}`)];
      case "dictionary bias":
        return [plain(`bias of the dictionary${of}`)];
      case "model bias":
        return [plain("biases of the model")];
      case "error":
        return [plain(`error of the dictionary${of}`)];
      default:
        return [plain(`remainder: ${number.format(node.count)} smaller parts`)];
    }
  }

  const always = new Set(["dictionary bias", "model bias", "error", "remainder"]);

  // ---- colours of numbers -----------------------------------------------------------------------------------------

  // Warm raises, cool lowers; as strong as the value is of the largest.
  function heat(node, value, most) {
    const share = most ? Math.min(1, Math.abs(value) / most) : 0;
    if (share < 0.02) return;
    const colour = value > 0 ? "var(--shade)" : "var(--cool)";
    node.style.setProperty("--heat", `color-mix(in srgb, ${colour} ${Math.round(8 + 72 * share)}%, transparent)`);
  }

  const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

  // ---- what is chosen ---------------------------------------------------------------------------------------------

  const address = () => `#/${state.prompt}/${state.position}/${state.feature}` + (state.path.length ? "/" + state.path.join(".") : "");
  function go(change) {
    Object.assign(state, change);
    history.pushState(null, "", address());
    draw();
  }

  function fromAddress() {
    const [prompt, position, feature, path] = location.hash.replace(/^#\/?/, "").split("/");
    const whole = (value, limit) => (/^\d+$/.test(value ?? "") && Number(value) < limit ? Number(value) : null);
    state.prompt = whole(prompt, prompts.length) ?? 0;
    state.position = whole(position, text().tokens.length) ?? text().tokens.length - 1;
    state.feature = whole(feature, onToken().shown.length) ?? 0;
    state.path = path && /^\d+(\.\d+)*$/.test(path) ? path.split(".").map(Number) : [];
  }

  // The nodes from the feature down to what is shown; the way ends early where this page was not told how to go on.
  function way() {
    const nodes = [root()];
    for (const place of state.path) {
      const next = nodes[nodes.length - 1].parts?.find((part) => part.place === place);
      if (!next) break;
      nodes.push(next);
    }
    return nodes;
  }

  // ---- drawing ----------------------------------------------------------------------------------------------------

  function draw() {
    drawPrompts();
    drawFeatures();
    if (!root()) {
      drawText(null, []);
      byId("sum").replaceChildren(make("p", "nothing", "No feature of the dictionary is active on this token."));
      return;
    }
    const nodes = way();
    const node = nodes[nodes.length - 1];
    drawText(node, nodes);
    drawSum(node, nodes);
    if (node.open && !node.parts && about.live) fetchParts(node, nodes);
  }

  function drawPrompts() {
    byId("prompts").replaceChildren(
      ...prompts.map((one, index) => {
        const button = write(make("button"), one.prompt);
        button.type = "button";
        button.setAttribute("aria-pressed", String(index === state.prompt));
        button.addEventListener("click", () => go({ prompt: index, position: one.tokens.length - 1, feature: 0, path: [] }));
        return button;
      }),
    );
  }

  const bySource = (node) => {
    const sums = new Array(text().tokens.length).fill(0);
    if (node?.table) for (const row of node.table) row.forEach((value, source) => (sums[source] += value));
    return sums;
  };

  function drawText(node, nodes) {
    // What was made by no heads keeps the shades of the last that was, on the way down to it.
    const sums = bySource([...nodes].reverse().find((one) => one.table));
    const most = largest(sums);
    const from = nodes.length > 1 ? nodes[nodes.length - 1].position : null;
    byId("text").replaceChildren(
      ...text().tokens.map((word, position) => {
        const button = write(make("button", position === state.position ? "chosen" : position === from ? "from" : ""), word, false);
        button.type = "button";
        button.dataset.position = position;
        if (most) {
          heat(button, sums[position], most);
          button.title = `brings ${signed(sums[position])}`;
        }
        button.addEventListener("click", () => go({ position, feature: 0, path: [] }));
        return button;
      }),
    );
    byId("legend").textContent = most
      ? "Shaded by what each token brings, by way of the heads, to the last feature or layer on the path below. Click a token for its own features."
      : "Click a token for its features.";
  }

  function drawFeatures() {
    const { firing, shown } = onToken();
    const box = byId("features");
    const heading = make("h2", "", "Active on ");
    heading.append(tokenChip(state.position));
    const items = make("ol");
    shown.forEach((node, index) => {
      const item = make("li");
      const button = make("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(index === state.feature));
      const names = make("span", "names");
      names.append(...(node.says ?? []).map(chip));
      button.append(make("span", "id", String(node.feature)), names, make("span", "number", digits(node.activation)));
      button.addEventListener("click", () => go({ feature: index, path: [] }));
      item.append(button);
      items.append(item);
    });
    const notes = [];
    if (firing > shown.length) notes.push(`The strongest ${shown.length} of ${firing} active features.`);
    if (shown.some((node) => node.says?.length)) notes.push("Beside each, the tokens that it promotes.");
    if (state.position === 0) notes.push("Dictionaries are not trained on the first token, which is unlike all others.");
    box.replaceChildren(heading, items, make("p", "", notes.join(" ")));
  }

  function drawSum(node, nodes) {
    const crumbs = make("ol", "crumbs");
    nodes.forEach((one, depth) => {
      const item = make("li");
      const last = depth === nodes.length - 1;
      const name = make(last ? "span" : "button");
      if (last) name.setAttribute("aria-current", "step");
      else {
        name.type = "button";
        name.addEventListener("click", () => go({ path: state.path.slice(0, depth) }));
      }
      name.append(...nameOf(one).flatMap((part) => [part, " "]));
      if (one.kind === "feature") name.append("on ", tokenChip(one.position));
      item.append(name);
      crumbs.append(item);
    });
    if (about.report && node.kind === "feature" && node.site === about.site) {
      const link = make("a", "", "contexts of this feature");
      link.href = `report.html#/feature/${node.feature}`;
      const item = make("li", "aside-link");
      item.append(link);
      crumbs.append(item);
    }
    byId("sum").replaceChildren(crumbs, equation(node, nodes[0]), ...body(node, nodes[0]));
  }

  function equation(node, first) {
    const line = make("p", "equation");
    line.append(make("b", "", digits(node.value)));
    if (node !== first) {
      const share = first.value ? ` of the ${digits(first.value)} at the start` : "";
      line.append(make("small", "", share));
    }
    const terms = [];
    const parts = node.parts ?? [];
    const sum = (kinds) => parts.filter((part) => kinds.includes(part.kind)).reduce((total, part) => total + part.value, 0);
    const groups = [
      [["source"], "from the tokens looked at"],
      [["feature"], "from features"],
      [["embedding"], "from the embedding"],
      [["attention"], "from heads of earlier layers"],
      [["mlp"], "from MLPs"],
      [["dictionary bias", "model bias"], "biases"],
      [["error"], "errors"],
      [["remainder"], "remainder"],
    ];
    for (const [kinds, words] of groups) if (parts.some((part) => kinds.includes(part.kind))) terms.push([sum(kinds), words]);
    terms.forEach(([value, words], index) => {
      line.append(index ? (value < 0 ? " − " : " + ") : value < 0 ? " = −" : " = ", digits(Math.abs(value)), " ", make("small", "", words));
    });
    return line;
  }

  function body(node, first) {
    if (!node.open) return [make("p", "nothing", "This part is taken as a whole.")];
    if (!node.parts) {
      const message = about.live ? "Following …" : "Not followed further in this file. apportion explore RUN --serve goes on from here.";
      return [make("p", "nothing", message)];
    }
    const boxes = [];
    const ways = make("div", "ways");
    if (node.table) {
      const heads = node.table.map((row, head) => [[make("span", "plain", `head ${head}`)], row.reduce((a, b) => a + b, 0), null, node.shares ? `${Math.round(node.shares[head] * 100)} % of its direction` : ""]);
      const most = Math.max(largest(heads.map((head) => head[1])), largest(node.parts.map((part) => part.value)));
      ways.append(barsOf("By head", node.shares ? "hover for its share of the direction" : "", heads, most));
      ways.append(partsOf("By source", "click one to see what made it", node, most, 14));
      boxes.push(ways, gridOf(node));
    } else {
      ways.classList.add("one");
      ways.append(partsOf("Parts", "click one to follow it", node, largest(node.parts.map((part) => part.value)), 40));
      boxes.push(ways);
    }
    if (node === first && node.control) boxes.push(controlOf(node.control));
    return boxes;
  }

  function bar([name, value, open, hint], most, rest = false) {
    const row = make(open ? "button" : "div", rest ? "part rest" : "part");
    if (open) {
      row.type = "button";
      row.addEventListener("click", open);
    }
    if (hint) row.title = hint;
    const names = make("span", "name");
    names.append(...name);
    const track = make("span", "track");
    const fill = make("i", value < 0 ? "down" : "");
    fill.style.setProperty("--size", most ? Math.abs(value) / most : 0);
    track.append(fill);
    row.append(names, track, make("span", "number", digits(value)));
    return row;
  }

  function barsOf(title, hint, rows, most) {
    const section = make("section");
    const heading = make("h3", "", title);
    heading.append(make("span", "", hint));
    section.append(heading, ...rows.map((row) => bar(row, most)));
    return section;
  }

  // The largest parts, what must never be missing, and the sum of the others.
  function partsOf(title, hint, node, most, limit) {
    const sorted = [...node.parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const ordinary = sorted.filter((part) => !always.has(part.kind));
    const few = ordinary.slice(0, limit);
    const others = ordinary.slice(limit);
    const open = (part) => (part.open ? () => go({ path: [...state.path.slice(0, way().length - 1), part.place] }) : null);
    const section = barsOf(title, hint, few.map((part) => [nameOf(part), part.value, open(part), ""]), most);
    if (others.length) {
      const button = bar([[make("span", "plain", others.length === 1 ? "1 smaller one" : `${others.length} smaller ones`)], others.reduce((total, part) => total + part.value, 0), () => section.replaceWith(partsOf(title, hint, node, most, Infinity)), "Show them"], most, true);
      section.append(button);
    }
    section.append(...sorted.filter((part) => always.has(part.kind)).map((part) => bar([nameOf(part), part.value, null, ""], most, true)));
    const total = node.parts.reduce((sum, part) => sum + part.value, 0);
    section.append(make("p", "check", `Together ${digits(total)}; what they miss is rounding, ${node.rounding ? node.rounding.toExponential(0).replace("-", "−") : "0"} of their size.`));
    return section;
  }

  function gridOf(node) {
    const box = make("div", "grid-box");
    const heading = make("h3", "", "Head × source");
    heading.append(make("span", "", "hover for the number"));
    const scroll = make("div", "grid");
    const table = make("table");
    const most = largest(node.table.flat());
    const last = node.position;
    const shown = text().tokens.map((_, source) => source).filter((source) => !about.causal || source <= last);
    const head = make("tr");
    head.append(make("th"));
    for (const source of shown) {
      const cell = make("th");
      cell.append(write(make("span"), text().tokens[source], true));
      head.append(cell);
    }
    const top = make("thead");
    top.append(head);
    const rows = make("tbody");
    node.table.forEach((values, index) => {
      const row = make("tr");
      row.append(make("th", "", `head ${index}`));
      for (const source of shown) {
        const cell = make("td");
        heat(cell, values[source], most);
        cell.title = `head ${index}, token ${source}: ${digits(values[source])}`;
        row.append(cell);
      }
      rows.append(row);
    });
    table.append(top, rows);
    scroll.append(table);
    box.append(heading, scroll);
    return box;
  }

  function controlOf(control) {
    const percent = (share) => `${Math.round(share * 100)} %`;
    const note = make("p", "aside-note");
    note.append(
      "The strongest source holds ",
      make("b", "", percent(control.own)),
      " of what raises this feature. For random directions on this token it is ",
      make("b", "", percent(control.random)),
      ` (± ${Math.round(control.spread * 100)}). Localisation comes from the attention pattern, not from the dictionary; what a feature adds is what is moved.`,
    );
    return note;
  }

  // ---- asking (only where a server is there to answer) --------------------------------------------------------------

  async function asked(where, question) {
    const answer = await fetch(where, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question) });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error);
    return content;
  }

  async function fetchParts(node, nodes) {
    const question = { prompt: text().prompt, feature: root().feature, position: state.position, path: state.path.slice(0, nodes.length - 1) };
    try {
      const found = await asked("follow", question);
      Object.assign(node, { parts: found.parts, table: found.table, rounding: found.rounding });
      draw();
    } catch (error) {
      complain(error);
    }
  }

  async function explore(event) {
    event.preventDefault();
    const [box, button] = [byId("prompt"), byId("ask").querySelector("button")];
    const typed = box.value;
    if (!typed.trim()) return;
    const before = prompts.findIndex((one) => one.prompt === typed);
    if (before >= 0) return go({ prompt: before, position: prompts[before].tokens.length - 1, feature: 0, path: [] });
    button.disabled = true;
    byId("notice").hidden = true;
    try {
      prompts.push(await asked("explore", { prompt: typed }));
      go({ prompt: prompts.length - 1, position: prompts[prompts.length - 1].tokens.length - 1, feature: 0, path: [] });
    } catch (error) {
      complain(error);
    } finally {
      button.disabled = false;
    }
  }

  function complain(error) {
    byId("notice").hidden = false;
    byId("notice").textContent = error.message;
  }

  function pressed(event) {
    if (event.target.closest?.("textarea, input") || event.ctrlKey || event.metaKey || event.altKey || byId("guide").open) return;
    const step = (by) => go({ position: Math.min(Math.max(state.position + by, 0), text().tokens.length - 1), feature: 0, path: [] });
    const other = (by) => go({ feature: Math.min(Math.max(state.feature + by, 0), Math.max(onToken().shown.length - 1, 0)), path: [] });
    const actions = {
      ArrowLeft: () => step(-1),
      ArrowRight: () => step(1),
      ArrowUp: () => other(-1),
      ArrowDown: () => other(1),
      Escape: () => state.path.length && go({ path: state.path.slice(0, -1) }),
      t: nextTheme,
      "?": () => byId("guide").showModal(),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  async function begin() {
    setTheme(kept("theme") ?? "system");
    byId("theme").addEventListener("click", nextTheme);
    byId("help").addEventListener("click", () => byId("guide").showModal());
    about = (await unpack("about")).plain;
    const names = [...document.querySelectorAll("script[id^='block-prompt-']")].map((block) => block.id.slice("block-".length));
    prompts.push(...(await Promise.all(names.map(unpack))).map((block) => block.plain));
    byId("ask")?.addEventListener("submit", explore);
    byId("prompt")?.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) explore(event);
    });
    addEventListener("popstate", () => {
      fromAddress();
      draw();
    });
    addEventListener("keydown", pressed);
    fromAddress();
    draw();
    document.documentElement.dataset.ready = "";
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", () => begin().catch(complain));
  else begin().catch(complain);
})();
