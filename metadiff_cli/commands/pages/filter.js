"use strict";
{
  const find = (id) => document.getElementById(id);
  const PAGE = 120; // cards laid out at first, and more of them on each scroll to the end
  const place = find("cards");
  const form = find("filters");
  const cards = Array.from(place.children, (element, index) => ({
    element,
    index,
    label: Number(element.dataset.label),
    confidence: Number(element.dataset.confidence),
    wrong: "wrong" in element.dataset,
    on: false,
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

  let fitting = cards;
  let limit = PAGE;

  const extend = () => {
    const on = new Set(fitting.slice(0, limit));
    for (const card of cards) {
      if (card.on !== on.has(card)) card.element.classList.toggle("on", (card.on = on.has(card)));
    }
    find("more").hidden = fitting.length <= limit;
    find("more").textContent = `Show more (${Math.max(0, fitting.length - limit)} are left)`;
  };

  const more = () => {
    limit += PAGE;
    extend();
  };

  const update = () => {
    arrange();
    const label = find("class").value;
    const most = Number(find("most").value);
    const text = find("text").value.trim().toLowerCase();
    const wrong = find("wrong")?.checked;
    const fits = (card) =>
      (label === "" || card.label === Number(label)) &&
      (most === 100 || card.confidence * 100 <= most) &&
      (!wrong || card.wrong) &&
      card.path.includes(text);
    fitting = cards.filter(fits).sort(orders[order]);
    const kept = new Set(fitting);
    for (const card of cards) card.element.hidden = !kept.has(card);
    limit = PAGE;
    extend();
    const all = fitting.length === cards.length;
    find("most-value").textContent = `${most} %`;
    find("shown").textContent = all ? `${cards.length} images` : `${fitting.length} of ${cards.length} images`;
    find("nothing").hidden = fitting.length > 0 || cards.length === 0;
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
  find("more").addEventListener("click", more);
  const end = new IntersectionObserver(
    (entries) => {
      if (!entries[0].isIntersecting) return;
      more();
      end.unobserve(find("more")); // observing anew tells again when the end is still near
      end.observe(find("more"));
    },
    { rootMargin: "1500px" },
  );
  end.observe(find("more"));
  form.hidden = cards.length === 0;
  update();
}
