/* Draws what `book/_ext/explorer.py` puts into a page: "my setting" and the table of all runs. No library, no network. */
"use strict";
(() => {
  const source = document.getElementById("records");
  if (!source) return;
  const { runs, settings } = JSON.parse(source.textContent);
  const places = document.querySelectorAll(".explorer");
  const PAGE = 25; // rows at a time
  const OTHERS = 3; // settings that are shown folded, below the first

  // ---- small tools

  /** An element with attributes and children; texts are never read as HTML. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  /** The same for a drawing. */
  function draw(tag, attributes = {}, text = null) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    return element;
  }

  const known = (value) => value !== null && value !== undefined && value !== "";
  const or = (value, otherwise = "–") => (known(value) ? String(value) : otherwise);
  const points = (value) => value.toFixed(1);
  const whole = (value) => value.toLocaleString("en-US");
  const interval = (low, high) => `${points(low)} to ${points(high)}`;

  /** 0.0005 as 5e-4, as code has it. */
  function rateText(rate) {
    return known(rate) ? rate.toExponential().replace("e+0", "") : "–";
  }

  // ---- the runs, as objects

  const texts = new Set(runs.texts);
  const table = runs.rows.map((row) =>
    Object.fromEntries(
      runs.columns.map((name, i) => [name, texts.has(name) && row[i] !== null ? runs.strings[row[i]] : row[i]])
    )
  );

  const HOW = { validation: "chosen", epoch: "epoch chosen", fixed: "fixed" };
  const howText = (run) => HOW[run.how] + (run.tried ? `, ${run.tried} tried` : "");

  // ---- what the address remembers

  const remembered = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  function remember(name, value) {
    if (known(value)) remembered.set(name, value);
    else remembered.delete(name);
    history.replaceState(null, "", `#${remembered}`);
  }

  // ---- my setting

  const DIMENSIONS = [
    ["labels", "Labels", 2],
    ["per_class", "Labelled documents per class", 1],
    ["words", "Words per document", 1],
  ];
  const FAR = [
    [1.5, "near", "A recorded setting is near yours."],
    [3, "some way", "The nearest setting is some way from yours. Read the figure as a hint."],
    [8, "far", "No recorded setting is near yours. The nearest one is far away: measure on your own documents."],
    [Infinity, "very far", "No recorded setting is near yours. What follows says almost nothing about it: measure on your own documents."],
  ];
  const NONE = "No run has chosen its settings on validation documents yet, so there is nothing to show.";
  const WRONG = "Please give three whole numbers: at least two labels, one document and one word.";
  const MISSING = {
    head: "The head is not recorded in this setting.",
    "instruction tuning": "Instruction tuning is not recorded in this setting.",
  };

  /** How many times as large the larger of two numbers is; unknown counts as very far. */
  const times = (a, b) => (known(a) && known(b) && a > 0 && b > 0 ? Math.max(a / b, b / a) : Infinity);

  const familiesOf = (setting) => new Set(setting.methods.map((method) => method.family));
  const hasBoth = (setting) => Object.keys(MISSING).every((family) => familiesOf(setting).has(family));

  /** Recorded settings by distance: doublings in the three numbers, added up. First the nearest that has both approaches. */
  function nearest(mine) {
    const found = settings.map((setting) => {
      const ratios = DIMENSIONS.map(([name]) => times(setting[name], mine[name]));
      return { setting, ratios, doublings: ratios.reduce((sum, ratio) => sum + Math.log2(ratio), 0) };
    });
    const size = ({ setting }) => setting.methods.length;
    found.sort((a, b) => (a.doublings === b.doublings ? size(b) - size(a) : a.doublings - b.doublings));
    const first = found.find(({ setting }) => hasBoth(setting)) ?? found[0];
    return [first, ...found.filter((each) => each !== first)];
  }

  function distanceTable({ setting, ratios }, mine) {
    const rows = DIMENSIONS.map(([name, heading], i) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, heading),
        make("td", { class: "number" }, whole(mine[name])),
        make("td", { class: "number" }, known(setting[name]) ? whole(setting[name]) : "not measured"),
        make("td", { class: "number" }, ratios[i] === Infinity ? "unknown" : ratios[i] < 1.05 ? "the same" : `${ratios[i].toFixed(1)} times`)
      )
    );
    const heads = ["", "yours", "recorded", "apart"].map((text) =>
      text ? make("th", { scope: "col", class: "number" }, text) : make("td", {})
    );
    return make(
      "table",
      { class: "distance" },
      make("caption", { class: "visually-hidden" }, "How far this recorded setting is from yours"),
      make("thead", {}, make("tr", {}, ...heads)),
      make("tbody", {}, ...rows)
    );
  }

  const FAMILIES = ["head", "instruction tuning", "encoder", "word counts", "other"];
  const styleOf = (family) => (family === "other" ? "other-method" : family.replace(" ", "-"));
  const fullName = (method) => method.method + (method.variant ? ` (${method.variant})` : "");
  const ordered = (methods) =>
    [...methods].sort((a, b) => FAMILIES.indexOf(a.family) - FAMILIES.indexOf(b.family) || b.mean - a.mean);

  /** A marker: the head is a circle, instruction tuning a diamond, an encoder a triangle, word counts a square. */
  function marker(family, x, y) {
    const look = { class: "dot" };
    if (family === "head") return draw("circle", { ...look, cx: x, cy: y, r: 7 });
    if (family === "instruction tuning") return draw("path", { ...look, d: `M${x} ${y - 9}l9 9l-9 9l-9 -9z` });
    if (family === "encoder") return draw("path", { ...look, d: `M${x} ${y - 8}l9 15h-18z` });
    if (family === "word counts") return draw("rect", { ...look, x: x - 6.5, y: y - 6.5, width: 13, height: 13 });
    return draw("circle", { class: "dot hollow", cx: x, cy: y, r: 6, "stroke-width": 2 });
  }

  /** Macro-F1 of every method with interval and seeds, as wide as there is room. */
  function figure(setting, width) {
    const methods = ordered(setting.methods);
    const every = methods.flatMap((method) => [method.low, method.high, ...method.scores]);
    const step = 10;
    const least = Math.floor((Math.min(...every) - 1) / step) * step;
    const most = Math.ceil((Math.max(...every) + 1) / step) * step;
    const [left, right, row, bottom] = [12, 52, 54, 44];
    const height = methods.length * row + bottom;
    const at = (score) => left + ((score - least) / (most - least)) * (width - left - right);
    const svg = draw("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.setAttribute("aria-label", "Macro-F1 of each method in this setting, with interval and seeds. The numbers are in the table below it.");
    for (let tick = least; tick <= most; tick += step) {
      svg.append(draw("line", { class: "grid", x1: at(tick), x2: at(tick), y1: 0, y2: height - bottom }));
      svg.append(draw("text", { x: at(tick), y: height - bottom + 18, "text-anchor": "middle" }, tick));
    }
    svg.append(draw("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "macro-F1 on the test set, %"));
    methods.forEach((method, i) => {
      const group = draw("g", { class: styleOf(method.family) });
      const y = i * row + 36;
      group.append(draw("text", { x: left, y: y - 17 }, fullName(method)));
      group.append(draw("text", { x: width, y: y - 17, "text-anchor": "end", "font-weight": 600 }, points(method.mean)));
      group.append(draw("line", { class: "dot", x1: at(method.low), x2: at(method.high), y1: y, y2: y, "stroke-width": 3 }));
      group.append(marker(method.family, at(method.mean), y));
      for (const score of method.scores) group.append(draw("circle", { class: "seed", cx: at(score), cy: y, r: 3.5 }));
      svg.append(group);
    });
    return svg;
  }

  function numbersTable(setting) {
    const heads = ["method", "macro-F1 %", "95 % interval", "each seed"];
    const rows = ordered(setting.methods).map((method) => {
      const chosen = method.rates.every(known) ? `rates chosen: ${method.rates.map(rateText).join(", ")}` : `chosen: ${method.chosen.join("; ")}`;
      return make(
        "tr",
        {},
        make("th", { scope: "row" }, fullName(method), make("span", { class: "more" }, chosen), make("span", { class: "more" }, or(method.base_model, ""))),
        make("td", { class: "number" }, points(method.mean)),
        make("td", { class: "number nowrap" }, interval(method.low, method.high)),
        make("td", { class: "number" }, method.scores.map(points).join(", "))
      );
    });
    return make(
      "table",
      {},
      make("caption", { class: "visually-hidden" }, "The numbers of the figure"),
      make("thead", {}, make("tr", {}, ...heads.map((text, i) => make("th", { scope: "col", class: i ? "number" : null }, text)))),
      make("tbody", {}, ...rows)
    );
  }

  function described(setting) {
    const words = known(setting.words) ? `${setting.words} words` : "length not measured";
    return `${setting.task}: ${setting.labels} labels, ${or(setting.per_class, "?")} documents per class, ${words}`;
  }

  /** A recorded setting: how far it is, what is missing, figure and numbers. */
  function panel(found, mine) {
    const { setting } = found;
    const families = familiesOf(setting);
    const few = setting.methods.some((method) => method.seeds.length < 3);
    const notes = Object.entries(MISSING).filter(([family]) => !families.has(family)).map(([, text]) => text);
    if (few) notes.push("Some methods have fewer than three seeds here.");
    const amounts = `Test documents: ${setting.test}; documents to choose on: ${or(setting.validation)}.`;
    const drawing = make("div", { class: "drawing" });
    const fill = () => {
      const width = Math.floor(drawing.clientWidth);
      if (width > 0 && drawing.dataset.width !== String(width)) {
        drawing.dataset.width = width;
        drawing.replaceChildren(figure(setting, width));
      }
    };
    new ResizeObserver(fill).observe(drawing);
    return make(
      "div",
      {},
      distanceTable(found, mine),
      make("p", {}, [amounts, ...notes].join(" ")),
      drawing,
      make("details", {}, make("summary", {}, "The numbers of this figure, and the rates that were chosen"), numbersTable(setting))
    );
  }

  function mySetting(place) {
    const says = make("p", { class: "says", role: "status" });
    const results = make("div", {});
    if (!settings.length) {
      says.textContent = NONE;
      place.replaceChildren(says);
      return;
    }
    const fullest = settings.reduce((a, b) => (b.methods.length > a.methods.length ? b : a));
    const inputs = DIMENSIONS.map(([name, heading, least]) => {
      const given = Number(remembered.get(name));
      const value = given >= least ? given : fullest[name] ?? least;
      return make("input", { type: "number", id: `my-${name}`, name, min: least, step: 1, value, inputmode: "numeric", required: true });
    });
    const form = make(
      "form",
      { "aria-label": "My setting" },
      ...inputs.map((input, i) => make("div", {}, make("label", { for: input.id }, DIMENSIONS[i][1]), input))
    );
    const show = () => {
      const mine = Object.fromEntries(inputs.map((input) => [input.name, Number(input.value)]));
      if (inputs.some((input) => !input.validity.valid)) {
        says.dataset.far = "wrong";
        says.textContent = WRONG;
        results.replaceChildren();
        return;
      }
      const [first, ...rest] = nearest(mine);
      const [, far, sentence] = FAR.find(([most]) => Math.max(...first.ratios) <= most);
      says.dataset.far = far;
      says.textContent = sentence;
      const others = rest.slice(0, OTHERS).map((found) => {
        const details = make("details", { class: "other" }, make("summary", {}, described(found.setting)));
        details.addEventListener("toggle", () => details.children.length === 1 && details.append(panel(found, mine)));
        return details;
      });
      results.replaceChildren(
        make("h3", {}, described(first.setting)),
        panel(first, mine),
        ...(others.length ? [make("h3", {}, "Others, by distance"), ...others] : [])
      );
    };
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      remember(event.target.name, event.target.value);
      show();
    });
    place.replaceChildren(form, says, results);
    show();
  }

  // ---- all runs

  const phoneLine = (...parts) => make("span", { class: "more phone" }, parts.filter(known).join(" · "));
  const condition = (run) => [run.several ? "multi-label" : "", run.condition].filter(known).join(", ");

  // key, heading, class, what a cell shows
  const SHOWN = [
    [
      "task",
      "Task",
      "",
      (run) => [
        run.task,
        condition(run) ? make("span", { class: "more" }, condition(run)) : null,
        phoneLine(`${run.labels} labels`, known(run.per_class) ? `${run.per_class} per class` : "", known(run.words) ? `${run.words} words` : ""),
      ],
    ],
    ["labels", "Labels", "number wide", (run) => [run.labels]],
    ["per_class", "Docs per class", "number wide", (run) => [or(run.per_class)]],
    ["words", "Words", "number wide", (run) => [or(run.words)]],
    [
      "method",
      "Method",
      "",
      (run) => [run.method, phoneLine(known(run.rate) ? `rate ${rateText(run.rate)}` : "", howText(run), `seed ${run.seed}`)],
    ],
    ["seed", "Seed", "number wide", (run) => [run.seed]],
    ["rate", "Rate", "number wide nowrap", (run) => [rateText(run.rate)]],
    ["how", "Settings", "wide nowrap", (run) => [HOW[run.how], run.tried ? make("span", { class: "more" }, `${run.tried} tried`) : null]],
    ["macro_f1", "Macro-F1 %", "number", (run) => [points(run.macro_f1), make("span", { class: "more" }, interval(run.low, run.high))]],
  ];

  const DETAILS = [
    ["Chosen on validation", (run) => [run.chosen, run.tried ? `${run.tried} configurations tried` : ""].filter(known).join("; ")],
    ["Epochs", (run) => run.epochs],
    ["Base model", (run) => run.base_model],
    ["Other settings", (run) => run.settings],
    ["Training documents", (run) => run.train],
    ["Documents to choose on", (run) => run.validation],
    ["Test documents", (run) => run.test],
    ["Accuracy %", (run) => points(run.accuracy)],
    ["Micro-F1 %", (run) => points(run.micro_f1)],
    ["Trained numbers", (run) => (known(run.trained) ? whole(run.trained) : null)],
    ["Seconds of training", (run) => whole(run.training_seconds)],
    ["Documents a second", (run) => (known(run.documents_per_second) ? whole(run.documents_per_second) : null)],
    ["Peak of memory in training, GB", (run) => run.memory],
    ["Machine", (run) => `${run.device}, ${run.threads} thread(s), ${run.dtype}${run.quantization ? `, ${run.quantization}` : ""}, profile ${run.profile}`],
    ["Recorded", (run) => [run.date, run.commit ? `commit ${run.commit}` : ""].filter(known).join(", ")],
    ["File", (run) => `book/results/${run.file}.jsonl`],
  ];

  const FILTERS = [
    ["task", "Task", (run) => run.task],
    ["family", "Kind of method", (run) => run.family],
    ["base_model", "Base model", (run) => or(run.base_model, "none")],
    ["how", "Settings", (run) => HOW[run.how]],
    ["file", "Experiment (file)", (run) => run.file],
  ];

  function allRuns(place) {
    const state = { sort: "task", down: false, page: 0, found: table };
    const words = (run) => Object.values(run).join(" ").toLowerCase();
    table.forEach((run) => (run.all = words(run)));

    const search = make("input", { type: "search", id: "runs-q", name: "q", value: remembered.get("q") ?? "", autocomplete: "off" });
    const selects = FILTERS.map(([name, , of]) => {
      const values = [...new Set(table.map(of))].sort();
      const select = make("select", { id: `runs-${name}`, name }, make("option", { value: "" }, "all"));
      select.append(...values.map((value) => make("option", { value }, value)));
      const given = remembered.get(name);
      if (values.includes(given)) select.value = given;
      return select;
    });
    const field = (control, heading) => make("div", {}, make("label", { for: control.id }, heading), control);
    const form = make(
      "form",
      { role: "search", "aria-label": "Filter the runs" },
      field(search, "Words anywhere in a run"),
      ...selects.map((select, i) => field(select, FILTERS[i][1]))
    );

    const status = make("p", { role: "status" });
    const reset = make("button", { type: "button" }, "Show all runs");
    const save = make("button", { type: "button" }, "Save these as CSV");
    const body = make("tbody", {});
    const heads = SHOWN.map(([name, heading, look]) => {
      const button = make("button", { type: "button" }, heading);
      const head = make("th", { scope: "col", class: look, "aria-sort": "none" }, button);
      button.addEventListener("click", () => {
        state.down = state.sort === name ? !state.down : name === "macro_f1";
        state.sort = name;
        state.page = 0;
        update();
      });
      return head;
    });
    const more = make("th", { scope: "col" }, make("span", { class: "visually-hidden" }, "Details"));
    const grid = make(
      "table",
      { class: "runs" },
      make("caption", { class: "visually-hidden" }, "Recorded runs; the buttons in the heading sort them"),
      make("thead", {}, make("tr", {}, ...heads, more)),
      body
    );
    const back = make("button", { type: "button" }, "Previous rows");
    const on = make("button", { type: "button" }, "Next rows");

    function detailsOf(run) {
      const list = make("dl", {});
      for (const [heading, of] of DETAILS) {
        const value = of(run);
        if (known(value)) list.append(make("dt", {}, heading), make("dd", {}, String(value)));
      }
      return list;
    }

    function rowOf(run, number) {
      const button = make(
        "button",
        { type: "button", "aria-expanded": "false", "aria-label": `Details of ${run.method}, ${run.task}, seed ${run.seed}` },
        "more"
      );
      const row = make("tr", {}, ...SHOWN.map(([, , look, cell]) => make("td", { class: look }, ...cell(run))), make("td", {}, button));
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "true";
        button.setAttribute("aria-expanded", String(!open));
        button.textContent = open ? "more" : "less";
        if (open) row.nextSibling.remove();
        else row.after(make("tr", { class: "details" }, make("td", { colspan: SHOWN.length + 1 }, detailsOf(run))));
      });
      return row;
    }

    /** Numbers by size, texts by the alphabet, what is not there last. */
    function compare(a, b) {
      const [one, other] = [a[state.sort], b[state.sort]];
      if (!known(one) || !known(other)) return known(other) - known(one);
      const order = typeof one === "string" ? one.localeCompare(other) : one - other;
      return state.down ? -order : order;
    }

    function update() {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = selects.map((select) => select.value);
      state.found = table
        .filter((run) => FILTERS.every(([, , of], i) => !chosen[i] || of(run) === chosen[i]) && wanted.every((word) => run.all.includes(word)))
        .sort(compare);
      const n = state.found.length;
      state.page = Math.min(state.page, Math.max(0, Math.ceil(n / PAGE) - 1));
      const first = state.page * PAGE;
      const rows = state.found.slice(first, first + PAGE);
      heads.forEach((head, i) => {
        const sorted = SHOWN[i][0] === state.sort;
        head.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
        head.firstChild.textContent = SHOWN[i][1] + (sorted ? (state.down ? " ▼" : " ▲") : "");
      });
      body.replaceChildren(...rows.map(rowOf));
      status.textContent = n ? `${n} of ${table.length} runs; rows ${first + 1} to ${first + rows.length}` : `None of ${table.length} runs`;
      back.disabled = state.page === 0;
      on.disabled = first + PAGE >= n;
      save.disabled = n === 0;
    }

    function turn(by) {
      state.page += by;
      update();
      grid.scrollIntoView({ block: "start" });
    }

    function asCsv() {
      const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
      const lines = [runs.columns, ...state.found.map((run) => runs.columns.map((name) => run[name]))];
      const file = new Blob([lines.map((line) => line.map(quoted).join(",")).join("\n")], { type: "text/csv" });
      const link = make("a", { href: URL.createObjectURL(file), download: "runs.csv" });
      link.click();
      URL.revokeObjectURL(link.href);
    }

    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      remember(event.target.name, event.target.value);
      state.page = 0;
      update();
    });
    reset.addEventListener("click", () => {
      [search, ...selects].forEach((control) => {
        control.value = "";
        remember(control.name, "");
      });
      state.page = 0;
      update();
    });
    save.addEventListener("click", asCsv);
    back.addEventListener("click", () => turn(-1));
    on.addEventListener("click", () => turn(1));
    place.replaceChildren(form, make("div", { class: "bar" }, status, reset, save), grid, make("div", { class: "bar" }, back, on));
    update();
  }

  for (const place of places) (place.dataset.part === "setting" ? mySetting : allRuns)(place);
})();
