"use strict";
{
  const find = (id) => document.getElementById(id);
  const place = find("cards");
  const form = find("filters");
  const cards = Array.from(place.children, (element, index) => ({
    element,
    index,
    label: Number(element.dataset.label),
    confidence: Number(element.dataset.confidence),
    wrong: "wrong" in element.dataset,
    path: element.querySelector(".path").title.toLowerCase(),
  }));
  const orders = {
    given: (a, b) => a.index - b.index,
    low: (a, b) => a.confidence - b.confidence || a.index - b.index,
    high: (a, b) => b.confidence - a.confidence || a.index - b.index,
    class: (a, b) => a.label - b.label || b.confidence - a.confidence || a.index - b.index,
  };
  let order = "given";

  const arrange = () => {
    if (find("order").value === order) return;
    order = find("order").value;
    place.replaceChildren(...[...cards].sort(orders[order]).map((card) => card.element));
  };

  const update = () => {
    arrange();
    const label = find("class").value;
    const most = Number(find("most").value);
    const text = find("text").value.trim().toLowerCase();
    const wrong = find("wrong")?.checked;
    let shown = 0;
    for (const card of cards) {
      const fits =
        (label === "" || card.label === Number(label)) &&
        (most === 100 || card.confidence * 100 <= most) &&
        (!wrong || card.wrong) &&
        card.path.includes(text);
      card.element.hidden = !fits;
      shown += fits;
    }
    find("most-value").textContent = `${most} %`;
    find("shown").textContent = shown === cards.length ? `${shown} images` : `${shown} of ${cards.length} images`;
    find("nothing").hidden = shown > 0 || cards.length === 0;
  };

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update)); // the fields change after this event
  for (const button of document.querySelectorAll("button.show")) {
    button.addEventListener("click", () => {
      find("class").value = button.dataset.class;
      update();
      find("results").scrollIntoView();
      find("class").focus({ preventScroll: true });
    });
  }
  document.documentElement.classList.add("live");
  form.hidden = cards.length === 0;
  update();
}
