/* Filters for the tables of class "handbook-filterable": a text box and one list
   for each column whose heading has class "filter". Without JavaScript the whole
   table stands there. The address keeps the choice, so a filtered view can be linked. */
(() => {
  "use strict";

  const fold = (text) => text.normalize("NFKD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
  const squeeze = (text) => fold(text).replace(/[^\p{L}\p{N}]+/gu, "");

  function element(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function field(label, control, id) {
    control.id = id;
    const caption = element("label", { textContent: label });
    caption.htmlFor = id;
    return element("div", { className: "handbook-field" }, caption, control);
  }

  function choices(rows, column) {
    const values = [...new Set(rows.map((row) => row.cells[column].textContent.trim()))];
    const list = element("select", {}, element("option", { value: "", textContent: "all" }));
    if (values.includes("open")) list.append(element("option", { value: "settled", textContent: "settled (all but open)" }));
    for (const value of values) list.append(element("option", { value, textContent: value }));
    return list;
  }

  function fits(value, wanted) {
    return wanted === "" || value === wanted || (wanted === "settled" && value !== "open");
  }

  /* On a phone the style sheet turns rows into blocks, which would cost the table its
     roles; stated, they stay. */
  function keepRoles(table) {
    const roles = { TABLE: "table", THEAD: "rowgroup", TBODY: "rowgroup", TR: "row", TH: "columnheader", TD: "cell" };
    for (const node of [table, ...table.querySelectorAll("thead, tbody, tr, th, td")]) node.setAttribute("role", roles[node.tagName]);
  }

  function arm(table, number) {
    keepRoles(table);
    const rows = [...table.tBodies[0].rows];
    const heads = [...table.tHead.rows[0].cells];
    const noun = heads[0].textContent.trim().toLowerCase() + "s";
    const texts = rows.map((row) => [fold(row.textContent), squeeze(row.textContent)]);
    const box = element("input", { type: "search", autocomplete: "off", spellcheck: false });
    const lists = heads
      .map((head, column) => ({ head, column }))
      .filter(({ head }) => head.classList.contains("filter"))
      .map(({ head, column }) => ({ column, name: head.textContent.trim().toLowerCase(), list: choices(rows, column) }));
    const count = element("output", { className: "handbook-count" });
    count.setAttribute("aria-live", "polite");
    const reset = element("button", { type: "button", textContent: "Show all" });
    const form = element("form", { className: "handbook-filter" });
    form.setAttribute("role", "search");
    form.setAttribute("aria-label", `Filter the ${noun}`);
    form.append(field(noun === "components" ? "Name, id or synonym" : "Words or id", box, `handbook-q-${number}`));
    for (const { name, list } of lists) form.append(field(name[0].toUpperCase() + name.slice(1), list, `handbook-${name}-${number}`));
    form.append(reset, count);

    const controls = [["q", box], ...lists.map(({ name, list }) => [name, list])];
    const query = new URLSearchParams(location.search);
    for (const [name, control] of controls) if (query.get(name)) control.value = query.get(name);

    function apply() {
      const words = fold(box.value).split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        const [plain, squeezed] = texts[i];
        const found = words.every((word) => plain.includes(word) || (squeeze(word) && squeezed.includes(squeeze(word))));
        row.hidden = !(found && lists.every(({ column, list }) => fits(row.cells[column].textContent.trim(), list.value)));
        shown += row.hidden ? 0 : 1;
      });
      count.textContent = shown ? `${shown} of ${rows.length} ${noun}` : `None of ${rows.length} ${noun} fits`;
      reset.disabled = controls.every(([, control]) => control.value === "");
      const kept = new URLSearchParams(controls.filter(([, c]) => c.value).map(([name, c]) => [name, c.value]));
      const address = location.pathname + (kept.size ? `?${kept}` : "") + location.hash;
      history.replaceState(history.state, "", address);
    }

    function clear() {
      for (const [, control] of controls) control.value = "";
      apply();
    }

    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    reset.addEventListener("click", () => {
      clear();
      box.focus();
    });
    const uncover = () => {
      const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
      if (target && table.contains(target) && target.hidden) {
        clear();
        target.scrollIntoView();
      }
    };
    window.addEventListener("hashchange", uncover);
    const frame = table.closest(".pst-scrollable-table-container") || table;
    frame.before(form);
    apply();
    uncover();
  }

  document.querySelectorAll("table.handbook-filterable").forEach(arm);
})();
