"use strict";
(() => {
  const gallery = document.getElementById("gallery");
  if (!gallery) return;

  // A switch shows or hides one kind of box, or the names, in all pictures at once.
  for (const button of gallery.querySelectorAll("[data-switch]")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      gallery.classList.toggle("hide-" + button.dataset.switch, !shown);
    });
  }

  const slider = document.getElementById("threshold");
  const value = document.getElementById("threshold-value");
  const boxes = [...gallery.querySelectorAll("[data-score]:not(.truth)")];
  const apply = () => {
    const least = Number(slider.value);
    value.textContent = least.toFixed(2);
    for (const box of boxes) {
      box.classList.toggle("below", Number(box.dataset.score) < least - 1e-9);
    }
    for (const card of gallery.querySelectorAll(".card")) {
      for (const line of card.querySelectorAll("[data-count]")) {
        const own = ".box." + line.dataset.count + ":not(.below)";
        line.querySelector(".found").textContent = card.querySelectorAll(own + ".right").length;
        line.querySelector(".wrong").textContent = card.querySelectorAll(own + ".wrong").length;
      }
    }
  };
  slider.addEventListener("input", apply);
  apply(); // a browser may have kept the slider's place over a reload
})();
