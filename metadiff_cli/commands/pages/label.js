{
  const fields = [...document.querySelectorAll("#suggested input")];
  const support = JSON.parse(document.getElementById("listed").textContent);
  const save = document.getElementById("save");
  const cell = (text) => `"${text.replaceAll('"', '""')}"`;
  const labels = () =>
    fields.filter((field) => field.value.trim()).map((field) => [JSON.parse(field.dataset.path), field.value.trim()]);

  const update = () => {
    const done = labels().length;
    save.disabled = done === 0;
    document.getElementById("labelled").textContent = `${done} of ${fields.length} labelled`;
  };

  save.addEventListener("click", () => {
    const rows = [["path", "label"], ...support, ...labels()];
    const text = rows.map((row) => `${row.map(cell).join(",")}\n`).join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "labels.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000); // a slow browser may not have read it yet
  });
  for (const field of fields) field.addEventListener("input", update);
  update(); // a page that is loaded again may still hold what was typed
}
