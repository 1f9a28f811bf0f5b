// The list of features and the page of each; `page` is in page.js.
(() => {
  const { byId, make, number, unpack, write, digits, keep, kept, setTheme, nextTheme } = page;

  // ---- blocks ---------------------------------------------------------------------------------------------------

  const recent = new Map();
  function chunkOf(feature) {
    const name = "features-" + Math.floor(feature / about.chunk);
    const kept = recent.get(name) ?? unpack(name);
    recent.delete(name);
    recent.set(name, kept);
    if (recent.size > 24) recent.delete(recent.keys().next().value);
    return kept;
  }

  let about, list, words, tokenIds, corpus, windows, labels, documents;

  async function loadShared() {
    if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old for this report: any Chrome, Edge, Firefox or Safari since 2023 will do");
    const [aboutBlock, listBlock, vocabulary, corpusBlock, windowsBlock] = await Promise.all(["about", "list", "vocabulary", "corpus", "windows"].map(unpack));
    about = aboutBlock.plain;
    list = listBlock;
    words = vocabulary.plain;
    tokenIds = vocabulary.id;
    corpus = corpusBlock;
    windows = windowsBlock;
    labels = new Map(Object.entries(list.plain.labels).map(([feature, label]) => [Number(feature), label]));
    documents = windows.plain.documents;
  }

  // ---- tokens ---------------------------------------------------------------------------------------------------

  const chipOf = (word) => write(make("span", "chip"), words[word], true);

  // Where a window lies in the corpus.
  function windowOf(feature, slot) {
    const at = feature * about.slots + slot;
    return { start: windows.start[at], length: windows.length[at], peak: windows.peak[at], document: windows.document[at] };
  }

  const rightToLeft = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/g;
  const letters = /\p{L}/gu;
  function runsLeft(found) {
    let text = "";
    for (let i = 0; i < found.length; i++) text += words[corpus.tokens[found.start + i]];
    const all = text.match(letters)?.length ?? 0;
    return all > 0 && (text.match(rightToLeft)?.length ?? 0) > all / 2;
  }

  // A window as [before | pivot after], where the pivot is its peak or, in a search, what was found. `shares` (activation / maximum, 0..65535) shades; `hit` marks a search's match.
  function kwic(found, shares = null, hit = null) {
    const node = make("span", "kwic");
    const [before, after] = [make("span", "before"), make("span", "after")];
    const [run, tail] = [make("span"), make("span")];
    let head = null;
    const pivot = hit ? hit[0] - found.start : found.peak;
    for (let i = 0; i < found.length; i++) {
      const place = found.start + i;
      const into = i < pivot ? run : tail;
      if (i === pivot) head = tokenNode(found, i, shares, hit);
      else if (i === found.peak || shares || (hit && place >= hit[0] && place < hit[1])) into.append(tokenNode(found, i, shares, hit));
      // Nothing to shade: plain text, so that a list of these stays light.
      else write(into, words[corpus.tokens[place]]);
    }
    before.append(run);
    if (head) after.append(head);
    after.append(tail);
    node.append(before, after);
    return node;
  }

  function wrapped(found, shares, hit = null) {
    const node = make("span", "wrapped");
    if (runsLeft(found)) node.dir = "rtl";
    for (let i = 0; i < found.length; i++) node.append(tokenNode(found, i, shares, hit));
    return node;
  }

  function tokenNode(found, i, shares, hit) {
    const place = found.start + i;
    const matched = hit && place >= hit[0] && place < hit[1];
    const node = make(matched ? "mark" : "span", i === found.peak ? "tok peak" : "tok");
    if (shares) {
      node.dataset.place = place;
      node.dataset.share = shares[i];
      if (shares[i] > 0) {
        node.dataset.on = "";
        node.style.setProperty("--share", shares[i] / 65535);
      }
    }
    return write(node, words[corpus.tokens[place]]);
  }

  // ---- numbers --------------------------------------------------------------------------------------------------

  // Always three digits, for columns.
  const even = (value) => (value >= 1000 || value < 0.01 ? digits(value) : value.toPrecision(3));
  const densityOf = (feature) => list.fires[feature] / Math.max(about.tokens, 1);
  function percent(share) {
    if (share === 0) return "never";
    const value = share * 100;
    return (value >= 10 ? value.toFixed(1) : value >= 1 ? value.toFixed(2) : value >= 0.001 ? value.toFixed(3) : value.toExponential(0).replace("-", "−")) + " %";
  }

  // ---- search ---------------------------------------------------------------------------------------------------

  let promotedWords = 0;
  let corpusText = null; // built at the first search: the corpus in lower case, and where each token ends in it
  function textIndex() {
    if (corpusText) return corpusText;
    const lower = words.map((word) => word.toLowerCase());
    const ends = new Uint32Array(corpus.tokens.length);
    const parts = [];
    let length = 0;
    for (let i = 0; i < corpus.tokens.length; i++) {
      const word = lower[corpus.tokens[i]];
      parts.push(word);
      length += word.length;
      ends[i] = length;
    }
    corpusText = { lower, ends, text: parts.join("") };
    return corpusText;
  }

  // For every feature whose contexts hold the phrase: the first such slot. Matches are found in the shared text once,
  // then looked up window by window, so that 20,000 features take milliseconds. The text is stored without its gaps; a
  // match across a gap lies in no window.
  function searchContexts(phrase) {
    const { ends, text } = textIndex();
    const until = new Uint32Array(corpus.tokens.length); // a match begins in token i and ends before token until[i]
    const seen = new Uint32Array(corpus.tokens.length + 1);
    let token = 0;
    for (let at = text.indexOf(phrase); at >= 0; at = text.indexOf(phrase, at + 1)) {
      while (ends[token] <= at) token++;
      if (until[token]) continue;
      let last = token;
      while (ends[last] < at + phrase.length) last++;
      until[token] = last + 1;
    }
    for (let i = 0; i < until.length; i++) seen[i + 1] = seen[i] + (until[i] ? 1 : 0);
    const hits = new Map();
    for (let feature = 0; feature < about.features; feature++) {
      search: for (let slot = 0; slot < about.slots; slot++) {
        const at = feature * about.slots + slot;
        const start = windows.start[at];
        const stop = start + windows.length[at];
        if (seen[start] === seen[stop]) continue;
        for (let i = start; i < stop; i++) {
          if (until[i] && until[i] <= stop) {
            hits.set(feature, { slot, from: i, to: until[i] });
            break search;
          }
        }
      }
    }
    return hits;
  }

  const none = new Map();
  let results = { query: "", label: none, token: none, context: none };
  function search(query) {
    const phrase = query.toLowerCase();
    if (results.query === phrase) return results;
    const label = new Map();
    const token = new Map();
    if (!phrase) return (results = { query: "", label, token, context: none });
    for (const [feature, name] of labels) if (name.toLowerCase().includes(phrase)) label.set(feature, true);
    const id = /^#?(\d+)$/.exec(phrase);
    if (id && Number(id[1]) < about.features) label.set(Number(id[1]), true);
    if (about.lens) {
      const { lower } = textIndex();
      const matching = new Uint8Array(words.length);
      lower.forEach((word, i) => (matching[i] = word.includes(phrase)));
      for (let i = 0; i < list.promoted.length; i++) if (matching[list.promoted[i]]) token.set(Math.floor(i / promotedWords), true);
    }
    const context = phrase.startsWith("#") && id ? none : searchContexts(phrase);
    return (results = { query: phrase, label, token, context });
  }

  // ---- the list -------------------------------------------------------------------------------------------------

  const view = { query: "", scope: "all", sort: "id", down: false };
  let order = [];
  let chosen = -1;
  let columns;

  function defineColumns() {
    const byNumber = (array) => (feature) => array[feature];
    columns = [
      { key: "id", name: "Feature", value: (feature) => feature, first: "up" },
      { key: "name", name: about.lens ? (labels.size ? "Label or promoted tokens" : "Promotes") : "Label", value: nameOf, first: "up", style: "promotes", shown: about.lens > 0 || labels.size > 0 },
      { key: null, name: "Strongest context", style: "text" },
      { key: "score", name: "Score", value: (feature) => (Number.isNaN(list.score[feature]) ? -1 : list.score[feature]), style: "number rated", shown: list.score.length > 0, hint: `AUROC of the explanation by ${about.scorer}: 0.5 is chance, 1 is perfect` },
      { key: "density", name: "Active on", value: byNumber(list.fires), style: "number" },
      { key: "max", name: "Max", value: byNumber(list.max), style: "number max" },
      { key: "mean", name: "Mean", value: byNumber(list.mean), style: "number mean" },
      { key: "similar", name: "Nearest", value: byNumber(list.cosine), style: "number similar", shown: list.cosine.length > 0, hint: "Cosine to the nearest other feature" },
    ].filter((column) => column.shown !== false);
  }

  // Labelled features first and by their label, the others by the token they promote most.
  function nameOf(feature) {
    const label = labels.get(feature);
    if (label) return "0" + label.toLowerCase();
    return about.lens ? "1" + words[list.promoted[feature * promotedWords]].trim().toLowerCase() : "2";
  }

  const scopes = [
    ["all", "Everything"],
    ["label", "Labels and numbers"],
    ["token", "Promoted tokens"],
    ["context", "Contexts"],
  ];

  function arrange() {
    const found = search(view.query);
    let kept = null;
    if (view.query) {
      const maps = view.scope === "all" ? [found.label, found.token, found.context] : [found[view.scope]];
      kept = new Set(maps.flatMap((map) => [...map.keys()]));
    }
    order = [];
    for (let feature = 0; feature < about.features; feature++) if (!kept || kept.has(feature)) order.push(feature);
    const column = columns.find((one) => one.key === view.sort) ?? columns[0];
    const sign = view.down ? -1 : 1;
    if (column.key === "name") {
      const names = new Map(order.map((feature) => [feature, nameOf(feature)]));
      const compare = new Intl.Collator("en").compare;
      order.sort((a, b) => sign * compare(names.get(a), names.get(b)) || a - b);
    } else order.sort((a, b) => sign * (column.value(a) - column.value(b)) || a - b);
    chosen = -1;
    drawHead();
    drawScopes(found);
    byId("found").textContent = view.query ? `${number.format(order.length)} of ${number.format(about.features)} features` : `${number.format(about.features)} features`;
    byId("spacer").style.height = `${order.length * rowHeight}px`;
    byId("spacer").replaceChildren();
    if (!order.length) byId("spacer").append(make("p", "nothing", "Nothing found. Searches look for the phrase as it is written, in upper or lower case."));
    drawn.clear();
    drawRows();
  }

  function drawHead() {
    const head = byId("head");
    head.replaceChildren(
      ...columns.map((column) => {
        const cell = make("div", column.style ?? "");
        cell.setAttribute("role", "columnheader");
        if (!column.key) {
          cell.append(make("span", "text", view.query ? "Matching context" : column.name));
          return cell;
        }
        const button = make("button", "", column.name);
        button.type = "button";
        button.title = column.hint ?? "Sort";
        button.dataset.sort = column.key;
        if (view.sort === column.key) cell.setAttribute("aria-sort", view.down ? "descending" : "ascending");
        button.addEventListener("click", () => {
          if (view.sort === column.key) view.down = !view.down;
          else Object.assign(view, { sort: column.key, down: column.first !== "up" });
          byId("scroller").scrollTop = 0;
          remember();
          arrange();
          byId("head").querySelector(`[data-sort="${column.key}"]`).focus();
        });
        cell.append(button);
        return cell;
      }),
    );
  }

  function drawScopes(found) {
    const box = byId("scopes");
    box.hidden = !view.query;
    if (!view.query) return;
    box.replaceChildren(
      ...scopes
        .filter(([key]) => key !== "token" || about.lens)
        .map(([key, name]) => {
          const button = make("button", "", name);
          button.type = "button";
          button.setAttribute("aria-pressed", String(view.scope === key));
          if (key !== "all") button.append(make("span", "count", number.format(found[key].size)));
          button.addEventListener("click", () => {
            view.scope = key;
            remember();
            arrange();
          });
          return button;
        }),
    );
  }

  const rowHeight = 32;
  const drawn = new Map();

  function drawRows() {
    const scroller = byId("scroller");
    const spare = 12;
    const first = Math.max(0, Math.floor(scroller.scrollTop / rowHeight) - spare);
    const last = Math.min(order.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / rowHeight) + spare);
    for (const [index, node] of drawn) {
      if (index < first || index >= last) {
        node.remove();
        drawn.delete(index);
      }
    }
    const fresh = document.createDocumentFragment();
    for (let index = first; index < last; index++) {
      if (drawn.has(index)) continue;
      const node = rowOf(order[index]);
      node.style.top = `${index * rowHeight}px`;
      if (index === chosen) node.classList.add("chosen");
      drawn.set(index, node);
      fresh.append(node);
    }
    byId("spacer").append(fresh);
    byId("table").style.setProperty("--scrollbar", `${scroller.offsetWidth - scroller.clientWidth}px`);
  }

  function says(feature) {
    const label = labels.get(feature);
    if (label) return make("span", "names label", label);
    const names = make("span", "names");
    if (about.lens) for (let i = 0; i < Math.min(4, promotedWords); i++) names.append(chipOf(list.promoted[feature * promotedWords + i]));
    return names;
  }

  function rowOf(feature) {
    const row = make("a", "row" + (columns.some((column) => column.key === "name") ? "" : " plain"));
    row.href = "#/feature/" + feature;
    row.dataset.feature = feature;
    row.setAttribute("role", "row");
    row.draggable = false;
    row.append(make("span", "id", String(feature)));
    if (!row.classList.contains("plain")) row.append(says(feature));
    const hit = view.query ? results.context.get(feature) : null;
    const found = windowOf(feature, hit ? hit.slot : 0);
    row.append(found.length ? kwic(found, null, hit ? [hit.from, hit.to] : null) : make("span", "dead", "never fired on this text"));
    const density = make("span", "density");
    const gauge = make("span", "gauge");
    const share = densityOf(feature);
    const fill = make("i");
    // From one in a hundred thousand to all: five decades on the gauge.
    fill.style.setProperty("--share", share ? Math.max(0.02, 1 + Math.log10(share) / 5) : 0);
    gauge.append(fill);
    density.append(gauge, make("span", share ? "" : "dead", percent(share)));
    if (list.score.length) row.append(ratedOf(feature));
    row.append(density, make("span", "number max", even(list.max[feature])), make("span", "number mean", even(list.mean[feature])));
    if (list.cosine.length) row.append(make("span", "number similar", list.cosine[feature].toFixed(2)));
    for (const cell of row.children) cell.setAttribute("role", "cell");
    return row;
  }

  function ratedOf(feature) {
    const score = list.score[feature];
    return Number.isNaN(score) ? make("span", "number rated dead", "–") : make("span", "number rated", score.toFixed(2));
  }

  function choose(index) {
    drawn.get(chosen)?.classList.remove("chosen");
    chosen = Math.min(Math.max(index, 0), order.length - 1);
    if (chosen < 0) return;
    const scroller = byId("scroller");
    const top = chosen * rowHeight;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    if (top + rowHeight > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + rowHeight - scroller.clientHeight;
    drawRows();
    drawn.get(chosen)?.classList.add("chosen");
  }

  // ---- a feature's page -----------------------------------------------------------------------------------------

  let current = -1;
  let rankOf = null;
  let aligned = true;

  async function showFeature(feature) {
    const wanted = (current = feature);
    const chunk = await chunkOf(feature);
    if (current !== wanted) return;
    const row = feature % about.chunk;
    const page = byId("view-feature");
    const columnsNode = make("div", "columns");
    const contexts = make("div");
    drawContexts(contexts, feature, chunk, row);
    const aside = make("aside");
    const explained = chunk.plain.explained[row];
    if (explained) aside.append(explanationOf(explained));
    aside.append(histogram(feature, chunk, row));
    if (about.lens) aside.append(lensOf(feature, chunk, row));
    if (about.nearest) aside.append(nearOf(chunk, row));
    columnsNode.append(contexts, aside);
    page.replaceChildren(titleOf(feature), statisticsOf(feature), columnsNode);
    document.title = `Feature ${feature} · ${reportTitle}`;
  }

  function titleOf(feature) {
    const node = make("div", "title");
    const heading = make("h1");
    heading.append(make("small", "", "Feature"), " " + feature);
    node.append(heading);
    if (labels.has(feature)) node.append(make("span", "name", labels.get(feature)));
    const place = order.indexOf(feature);
    const steps = make("span", "steps");
    const go = (name, key, target) => {
      const button = make("button", "quiet", name);
      button.type = "button";
      button.title = key;
      button.disabled = target === undefined;
      button.addEventListener("click", () => open(target));
      return button;
    };
    steps.append(go("← previous", "←", neighbour(-1)));
    steps.append(make("span", "", place >= 0 ? `${number.format(place + 1)} of ${number.format(order.length)}${view.query ? ` for “${view.query}”` : ""}` : ""));
    steps.append(go("next →", "→", neighbour(1)));
    node.append(steps);
    return node;
  }

  function neighbour(by) {
    const place = order.indexOf(current);
    if (place >= 0) return order[place + by];
    const target = current + by;
    return target >= 0 && target < about.features ? target : undefined;
  }

  function statisticsOf(feature) {
    const node = make("dl", "statistics");
    const fires = list.fires[feature];
    if (!rankOf) {
      const byFires = Array.from(list.fires.keys()).sort((a, b) => list.fires[b] - list.fires[a] || a - b);
      rankOf = new Uint32Array(byFires.length);
      byFires.forEach((one, rank) => (rankOf[one] = rank + 1));
    }
    const add = (name, value, more = "") => {
      const pair = make("div");
      const says = make("dd", "", value);
      if (more) says.append(" ", make("small", "", more));
      pair.append(make("dt", "", name), says);
      node.append(pair);
    };
    add("Active on", fires ? percent(densityOf(feature)) : "never", fires ? `of tokens, 1 in ${number.format(Math.max(1, Math.round(about.tokens / fires)))}` : "");
    add("Activations", number.format(fires), `in ${number.format(about.tokens)} tokens`);
    add("Density rank", number.format(rankOf[feature]), `of ${number.format(about.features)}`);
    add("Largest", digits(list.max[feature]));
    add("Mean when active", digits(list.mean[feature]));
    return node;
  }

  function drawContexts(node, feature, chunk, row) {
    node.replaceChildren();
    const counts = histogramOf(chunk, row);
    about.groups.forEach(([from, to, low, high], index) => {
      const group = make("section", "group");
      const head = make("div", "group-head");
      head.append(make("h3", "", index === 0 ? "Strongest contexts" : `${Math.round(low * 100)}–${Math.round(high * 100)} % of the maximum`));
      const share = index === 0 ? null : shareBetween(counts, low * list.max[feature], high * list.max[feature]);
      head.append(make("span", "", index === 0 ? "one peak a context" : `${share >= 0.095 ? Math.round(share * 100) : Number((share * 100).toPrecision(1))} % of its activations`));
      if (index === 0) head.append(layoutSwitch(() => drawContexts(node, feature, chunk, row)));
      group.append(head);
      const before = group.childElementCount;
      for (let slot = from; slot < to; slot++) {
        const found = windowOf(feature, slot);
        if (!found.length) continue;
        const at = (row * about.slots + slot) * about.width;
        const shares = chunk.shares.subarray(at, at + found.length);
        const line = make("div", "context");
        line.dataset.document = found.document;
        // Aligned columns put what is read first on the left; a script that runs the other way is shown whole.
        line.append(aligned && !runsLeft(found) ? kwic(found, shares) : wrapped(found, shares));
        line.append(make("span", "value", even((shares[found.peak] / 65535) * list.max[feature])));
        group.append(line);
      }
      if (group.childElementCount > before) node.append(group);
      else if (index === 0) {
        group.append(make("p", "nothing", "This feature never fired on the text of this report."));
        node.append(group);
      }
    });
  }

  function layoutSwitch(redraw) {
    const box = make("span", "segments");
    for (const [name, value] of [["Aligned", true], ["Wrapped", false]]) {
      const button = make("button", "", name);
      button.type = "button";
      button.setAttribute("aria-pressed", String(aligned === value));
      button.addEventListener("click", () => {
        aligned = value;
        keep("layout", aligned ? "aligned" : "wrapped");
        redraw();
      });
      box.append(button);
    }
    return box;
  }

  // [lowest edge, highest edge, count] for each used bin of a feature.
  function histogramOf(chunk, row) {
    let at = 0;
    for (let i = 0; i < row; i++) at += chunk.histogram_size[i];
    const bins = [];
    for (let i = 0; i < chunk.histogram_size[row]; i++) {
      const bin = chunk.histogram_first[row] + i;
      bins.push([about.edges[bin], about.edges[bin + 1], chunk.histogram[at + i]]);
    }
    return bins;
  }

  function shareBetween(bins, low, high) {
    let inside = 0;
    let all = 0;
    const top = bins.length ? bins[bins.length - 1][1] : 0;
    for (const [from, to, count] of bins) {
      all += count;
      // The highest interval reaches to the end of the bin that holds the maximum.
      const upper = high >= list.max[current] * 0.999 ? top : high;
      inside += (count * Math.max(0, Math.min(to, upper) - Math.max(from, low))) / (to - from);
    }
    return all ? inside / all : 0;
  }

  const svg = (tag, attributes, text = null) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== null) node.textContent = text;
    return node;
  };

  // What a feature is said to mean, who says so, and how well it holds.
  function explanationOf(explained) {
    const section = make("section", "explained");
    const heading = make("h3", "", "Explanation");
    heading.append(make("span", "", [explained.style, explained.judge].filter(Boolean).join(" · ")));
    section.append(heading, make("p", "says", explained.text));
    if (explained.flagged) section.append(make("p", "aside-note", "The judge did not keep to the form that it was asked for."));
    if (!explained.scores.length) return section;
    const table = make("table");
    const head = make("tr");
    for (const [name, hint] of [["", ""], ["AUROC", "The chance that a text with the feature scores higher than one without"], ["Balanced", "Mean of the shares of texts with and without the feature that were told right"], ["By strength", "Share of texts with the feature that were recognised, from the weakest tenth of its activations to the strongest"]]) {
      const cell = make("th", "", name);
      if (hint) cell.title = hint;
      head.append(cell);
    }
    table.append(head);
    const figure = (value) => (value === null ? "–" : value.toFixed(2));
    for (const score of explained.scores) {
      const line = make("tr");
      line.append(make("th", "", score.name), make("td", "number", figure(score.auroc)), make("td", "number", figure(score.balanced)));
      const bars = make("td");
      if (score.quantiles.length) bars.append(quantilesOf(score));
      line.append(bars);
      table.append(line);
      const more = [];
      if (score.sources.length > 1) more.push("AUROC by negatives: " + score.sources.map(([source, value]) => `${source} ${figure(value)}`).join(", "));
      if (score.precision !== null) more.push(`expected precision on plain text ${figure(score.precision)}`);
      for (const [what, value] of score.notes) more.push(`${what.replaceAll("_", " ")}: ${typeof value === "number" ? digits(value) : value}`);
      if (score.failed.length) more.push("no answer: " + score.failed.map(([kind, count]) => `${count} ${kind}`).join(", "));
      if (!more.length) continue;
      const notes = make("tr");
      const cell = make("td", "aside-note", more.join(" · "));
      cell.colSpan = 4;
      notes.append(cell);
      table.append(notes);
    }
    section.append(table);
    return section;
  }

  function quantilesOf(score) {
    const [wide, tall] = [9, 20];
    const drawing = svg("svg", { viewBox: `0 0 ${score.quantiles.length * wide} ${tall}`, role: "img", class: "quantiles" });
    drawing.append(svg("title", {}, `Recognised by ${score.name}, from weak to strong activations`));
    score.quantiles.forEach((share, index) => {
      const height = share === null ? 0 : Math.max(1, share * tall);
      const bar = svg("rect", { class: "bar", x: index * wide + 1, width: wide - 2, y: tall - height, height });
      bar.append(svg("title", {}, `${index + 1} of ${score.quantiles.length}, weak to strong: ${share === null ? "no text" : Math.round(share * 100) + " % recognised"}`));
      drawing.append(bar);
    });
    drawing.append(svg("line", { class: "axis", x1: 0, x2: score.quantiles.length * wide, y1: tall, y2: tall }));
    return drawing;
  }

  function histogram(feature, chunk, row) {
    const section = make("section");
    const heading = make("h3", "", "Activations");
    heading.append(make("span", "", "logarithmic bins"));
    section.append(heading);
    const bins = histogramOf(chunk, row);
    if (!bins.length) {
      section.append(make("p", "dead", "none"));
      return section;
    }
    const [width, height, floor] = [330, 132, 108];
    const low = Math.log(bins[0][0]);
    const span = Math.max(Math.log(bins[bins.length - 1][1]) - low, 1e-9);
    const x = (value) => ((Math.log(value) - low) / span) * width;
    const most = Math.max(...bins.map((bin) => bin[2]));
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    drawing.append(svg("title", {}, `Histogram of the activations of feature ${feature}`));
    for (const [from, to, count] of bins) {
      const tall = (count / most) * (floor - 8);
      const bar = svg("rect", { class: "bar", x: x(from) + 0.5, width: Math.max(x(to) - x(from) - 1, 0.5), y: floor - Math.max(tall, count ? 1 : 0), height: Math.max(tall, count ? 1 : 0) });
      bar.append(svg("title", {}, `${digits(from)} to ${digits(to)}: ${number.format(count)}`));
      drawing.append(bar);
    }
    drawing.append(svg("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }));
    let free = -1;
    for (const power of Array.from({ length: 40 }, (_, i) => i - 20)) {
      for (const mantissa of [1, 2, 5]) {
        const value = mantissa * 10 ** power;
        const at = x(value);
        if (at < 6 || at > width - 10 || at < free) continue;
        free = at + 34;
        drawing.append(svg("line", { class: "axis", x1: at, x2: at, y1: floor, y2: floor + 4 }));
        drawing.append(svg("text", { x: at, y: floor + 16, "text-anchor": "middle" }, digits(value)));
      }
    }
    section.append(drawing);
    return section;
  }

  function lensOf(feature, chunk, row) {
    const section = make("section");
    const box = make("div", "lens");
    const offset = row * about.lens;
    const side = (name, kind, word, logits) => {
      const half = make("div");
      half.append(make("h3", "", name));
      const items = make("ol", kind);
      const most = Math.abs(logits[offset]) || 1;
      for (let i = 0; i < about.lens; i++) {
        const item = make("li");
        item.style.setProperty("--share", Math.min(1, Math.abs(logits[offset + i]) / most));
        const chip = chipOf(word(i));
        chip.dataset.word = word(i);
        item.append(chip, make("span", "number", logits[offset + i].toFixed(2).replace("-", "−")));
        items.append(item);
      }
      half.append(items);
      return half;
    };
    box.append(
      side("Promotes", "up", (i) => list.promoted[feature * promotedWords + i], chunk.promoted_logits),
      side("Suppresses", "down", (i) => chunk.suppressed[offset + i], chunk.suppressed_logits),
    );
    section.append(box);
    return section;
  }

  function nearOf(chunk, row) {
    const section = make("section");
    const heading = make("h3", "", "Nearest features");
    heading.append(make("span", "", "cosine"));
    section.append(heading);
    const items = make("ol", "near");
    for (let i = 0; i < about.nearest; i++) {
      const other = chunk.nearest[row * about.nearest + i];
      const item = make("li");
      const link = make("a");
      link.href = "#/feature/" + other;
      let names = says(other);
      if (!names.childNodes.length) names = peakWords(other);
      link.append(make("span", "id", String(other)), names, make("span", "number", chunk.nearest_cosine[row * about.nearest + i].toFixed(2).replace("-", "−")));
      item.append(link);
      items.append(item);
    }
    section.append(items);
    return section;
  }

  // Without a lens a feature is known by the tokens on which it peaks.
  function peakWords(feature) {
    const names = make("span", "names");
    const seen = new Set();
    for (let slot = 0; slot < about.groups[0][1] && seen.size < 4; slot++) {
      const found = windowOf(feature, slot);
      const word = corpus.tokens[found.start + found.peak];
      if (!found.length || seen.has(word)) continue;
      seen.add(word);
      names.append(chipOf(word));
    }
    return names;
  }

  // ---- summary --------------------------------------------------------------------------------------------------

  function drawHandful(step) {
    // The same handful whenever the report opens: a stride through the living features that shares no factor with most counts.
    const living = [];
    for (let feature = 0; feature < about.features; feature++) if (list.fires[feature] >= 10) living.push(feature);
    const box = byId("handful");
    const wanted = Math.min(8, living.length);
    const rows = new Set();
    for (let i = 0; rows.size < wanted; i++) rows.add(living[Math.floor(((step * 8 + i) * 0.6180339887 * living.length) % living.length)]);
    const head = make("div", "head row" + (columns.some((column) => column.key === "name") ? "" : " plain"));
    for (const column of columns) {
      const cell = make("div", column.style ?? "");
      cell.append(make("span", "text", column.name));
      head.append(cell);
    }
    box.replaceChildren(head, ...[...rows].map(rowOf));
    if (!wanted) box.append(make("p", "nothing", "No feature fired ten times on this text."));
  }

  // ---- where we are ---------------------------------------------------------------------------------------------

  const reportTitle = document.title;
  const open = (feature) => {
    if (feature !== undefined) location.hash = "#/feature/" + feature;
  };

  function listHash() {
    const said = new URLSearchParams();
    if (view.query) said.set("q", view.query);
    if (view.query && view.scope !== "all") said.set("in", view.scope);
    if (view.sort !== "id" || view.down) said.set("sort", (view.down ? "-" : "") + view.sort);
    const text = said.toString();
    return "#/features" + (text ? "?" + text : "");
  }
  function remember() {
    history.replaceState(null, "", listHash());
    lastList = listHash();
  }

  let lastScroll = 0;
  let lastList = null;
  function route() {
    const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
    const feature = /^feature\/(\d+)$/.exec(path);
    const name = feature ? "feature" : path === "features" ? "features" : "summary";
    if (!byId("view-features").hidden) lastScroll = byId("scroller").scrollTop;
    for (const one of ["summary", "features", "feature"]) byId("view-" + one).hidden = one !== name;
    for (const link of document.querySelectorAll("nav a")) {
      if (link.dataset.view === name || (name === "feature" && link.dataset.view === "features")) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    byId("tip").hidden = true;
    if (!feature) document.title = reportTitle;
    if (name === "features") {
      const said = new URLSearchParams(query);
      const sort = said.get("sort") ?? "id";
      Object.assign(view, {
        query: said.get("q") ?? "",
        scope: scopes.some(([key]) => key === said.get("in")) ? said.get("in") : "all",
        sort: columns.some((column) => column.key === sort.replace(/^-/, "")) ? sort.replace(/^-/, "") : "id",
        down: sort.startsWith("-"),
      });
      if (byId("search").value.trim() !== view.query) byId("search").value = view.query;
      const same = lastList === listHash();
      lastList = listHash();
      if (!same) {
        lastScroll = 0;
        arrange();
      }
      byId("scroller").scrollTop = lastScroll;
      const place = order.indexOf(current);
      drawRows();
      if (same && place >= 0) choose(place);
    } else {
      scrollTo(0, 0);
    }
    if (feature) {
      const wanted = Number(feature[1]);
      if (wanted < about.features) showFeature(wanted).catch(complain);
      else byId("view-feature").replaceChildren(make("p", "nothing", `There is no feature ${wanted}: this dictionary has features 0 to ${number.format(about.features - 1)}.`));
    }
  }

  // ---- tips, keys, colours --------------------------------------------------------------------------------------

  const spelled = (text) => JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replace(/[\u007f-\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));

  function tipFor(target) {
    const token = target.closest(".tok[data-place]");
    const chip = target.closest(".chip[data-word]");
    if (!token && !chip) return null;
    const word = token ? corpus.tokens[token.dataset.place] : Number(chip.dataset.word);
    const lines = [make("b", "", "“" + spelled(words[word]) + "”")];
    if (token) {
      const share = Number(token.dataset.share) / 65535;
      lines.push(make("div", "", share ? `activation ${digits(share * list.max[current])}, ${Math.round(share * 100)} % of the maximum` : "not active"));
    }
    const source = target.closest(".context")?.dataset.document;
    const name = source === undefined ? null : (documents[source] ?? `document ${source}`);
    lines.push(make("div", "", `token ${tokenIds[word]}` + (name ? ` · ${name}` : "")));
    return lines;
  }

  document.addEventListener("mouseover", (event) => {
    const tip = byId("tip");
    const lines = tipFor(event.target);
    tip.hidden = !lines;
    if (!lines) return;
    tip.replaceChildren(...lines);
    const box = event.target.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 12))}px`;
    tip.style.top = `${box.bottom + size.height + 12 > innerHeight ? box.top - size.height - 8 : box.bottom + 8}px`;
  });
  addEventListener("scroll", () => (byId("tip").hidden = true), true);

  function toSearch() {
    byId("search").focus();
    byId("search").select();
  }

  function pressed(event) {
    const typing = event.target.closest?.("input");
    if (event.ctrlKey || event.metaKey || event.altKey || byId("guide").open) return;
    if (typing) {
      if (event.key === "Escape") typing.blur();
      else if ((event.key === "ArrowDown" || event.key === "Enter") && order.length && !byId("view-features").hidden) {
        typing.blur();
        byId("scroller").focus();
        choose(0);
      } else return;
      event.preventDefault();
      return;
    }
    const inList = !byId("view-features").hidden;
    const inFeature = !byId("view-feature").hidden;
    const page = Math.max(1, Math.floor(byId("scroller").clientHeight / rowHeight) - 1);
    const actions = {
      "/": toSearch,
      "?": () => byId("guide").showModal(),
      t: nextTheme,
      r: () => open(Math.floor(Math.random() * about.features)),
    };
    if (inList) {
      Object.assign(actions, {
        ArrowDown: () => choose(chosen + 1),
        ArrowUp: () => choose(chosen - 1),
        PageDown: () => choose(chosen + page),
        PageUp: () => choose(chosen - page),
        Home: () => choose(0),
        End: () => choose(order.length - 1),
      });
      // A focused link or button answers to Enter by itself.
      if (chosen >= 0 && !event.target.closest("a, button")) actions.Enter = () => open(order[chosen]);
    }
    if (inFeature) {
      Object.assign(actions, {
        ArrowLeft: () => open(neighbour(-1)),
        ArrowRight: () => open(neighbour(1)),
        Escape: () => (location.hash = listHash()),
        w: () => document.querySelector('.group-head .segments [aria-pressed="false"]')?.click(),
      });
    }
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  function complain(error) {
    byId("notice").hidden = false;
    byId("notice").textContent = "This report cannot be shown: " + error.message;
  }

  async function begin() {
    setTheme(kept("theme") ?? "system");
    aligned = kept("layout") !== "wrapped";
    byId("theme").addEventListener("click", nextTheme);
    byId("help").addEventListener("click", () => byId("guide").showModal());
    await loadShared();
    promotedWords = about.lens;
    defineColumns();
    if (!list.cosine.length) document.body.classList.add("no-similar");
    if (list.score.length) document.body.classList.add("scored");
    if (!columns.some((column) => column.key === "name")) byId("head").classList.add("plain");
    let waiting = 0;
    let round = 0;
    byId("search").addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        view.query = byId("search").value.trim();
        if (byId("view-features").hidden) {
          location.hash = listHash();
          return;
        }
        remember();
        byId("scroller").scrollTop = 0;
        arrange();
      }, 120);
    });
    byId("others").addEventListener("click", () => drawHandful(++round));
    let pending = false;
    const soon = () => {
      if (pending) return;
      pending = true;
      requestAnimationFrame(() => {
        pending = false;
        drawRows();
      });
    };
    byId("scroller").addEventListener("scroll", soon, { passive: true });
    addEventListener("resize", soon);
    addEventListener("hashchange", route);
    addEventListener("keydown", pressed);
    arrange();
    drawHandful(0);
    route();
    document.documentElement.dataset.ready = "";
  }

  // The blocks stand after this script, so that the summary is on the screen before they have been read.
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", () => begin().catch(complain));
  else begin().catch(complain);
})();
