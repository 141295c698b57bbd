"""The page of logger.py --html in headless Chromium, for its tests."""

import numpy as np


class Page:
    """A report in headless Chromium, without a network."""

    def __init__(self, driver, path):
        self.driver, self.path = driver, path
        driver.get(path.resolve().as_uri())

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def set(self, name, value):
        """As a user does: the value, then the event."""
        self.js(
            "const node = document.getElementById(arguments[0]);"
            "node[node.type === 'checkbox' ? 'checked' : 'value'] = arguments[1];"
            "node.dispatchEvent(new Event('input', {bubbles: true}));",
            name,
            value,
        )

    def traces(self, key):
        """{run: (x, y)} of a chart of curves."""
        found = self.js(
            "const chart = document.querySelector(`[data-key='${arguments[0]}']`);"
            "return chart.data.map(trace => [trace.name, Array.from(trace.x), Array.from(trace.y)])",
            key,
        )
        return {name: (x, y) for name, x, y in found}

    def heat(self, name):
        return np.array(self.js("return document.getElementById(arguments[0]).data[0].z", name), float)

    def table(self):
        """The cells of the shown rows of the table of runs."""
        return self.js("return [...document.querySelectorAll('#runs tbody tr')].map(tr => "
                       "[...tr.cells].map(td => td.innerText.trim()))")  # fmt: skip

    def names(self):
        return [cells[0] for cells in self.table()]

    def click(self, selector, index=0):
        self.js("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, index)

    def visible(self, selector):
        """The texts of a selector's elements outside hidden sections."""
        return self.js("return [...document.querySelectorAll(arguments[0])].filter(e => !e.closest('[hidden]'))"
                       ".map(e => e.innerText.trim())", selector)  # fmt: skip

    def errors(self):
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
