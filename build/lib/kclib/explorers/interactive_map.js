// Runs in the browser when the choice of colour or the selection changes; kclib/maps.py gives it its names.

const recolour = () => {
  for (const glyph of [dots.glyph, dots.hover_glyph, dots.selection_glyph, dots.nonselection_glyph]) {
    glyph.fill_color = colours[select.value]
  }
  for (const [choice, bar] of Object.entries(bars)) bar.visible = choice == select.value
  note.text = notes[select.value]
}

const picture = (kernel) => {
  const canvas = document.createElement("canvas"), paint = canvas.getContext("2d")
  const [, height, width] = source.data.weights.shape
  Object.assign(canvas, {height, width})
  const largest = Math.max(...kernel.map(Math.abs)) || 1
  kernel.forEach((weight, k) => {
    paint.fillStyle = `rgb(${palette[Math.min(255, Math.floor(128 * (weight / largest + 1)))]})`
    paint.fillRect(k % width, Math.floor(k / width), 1, 1)
  })
  return image.replace("{picture}", canvas.toDataURL().split(",")[1])
}

const dot = (a, b) => a.reduce((sum, weight, k) => sum + weight * b[k], 0)
const norm = (a) => Math.sqrt(dot(a, a))
const average = (values) => values.reduce((sum, value) => sum + value, 0) / values.length

const describe = (indices, n_shown, clustering) => {
  const weights = Array.from(source.data.weights), size = weights.length / source.data.norm.length
  const kernels = indices.map((i) => weights.slice(i * size, (i + 1) * size))
  const mean = kernels[0].map((_, k) => average(kernels.map((kernel) => kernel[k])))
  const directed = kernels.filter((kernel) => norm(kernel) > 0)
  const alike = average(directed.map((kernel) => dot(mean, kernel) / norm(mean) / norm(kernel)))
  const count = (n) => n.toLocaleString("en")
  return `<div style="display: flex; gap: 14px; align-items: center">${picture(mean)}<div>
    <b>${count(indices.length)} kernel${indices.length == 1 ? "" : "s"} selected,
    ${count(n_shown)} shown</b><br>
    Their mean kernel, norm ${Number(norm(mean).toPrecision(3))} (weight units)<br>
    Mean cosine to it: ${Number.isFinite(alike) ? `${alike.toFixed(2)}, where 1 is one shape` : "none"}
    ${clustering ? `<br>Clusters below: ${clusterings[clustering]}` : ""}</div></div>`
}

const {indices} = source.selected
const shown = indices.slice(0, most)
const clustering = select.value in clusterings ? select.value : Object.keys(clusterings)[0]
const column = (name) => source.data[name == "cluster" ? clustering : name]

recolour()
table.source.data = Object.fromEntries(
  Object.keys(table.source.data).map((name) => [name, shown.map((i) => column(name)[i])]),
)
table.view.change.emit() // else as many rows as before would stay those of before
summary.text = indices.length ? describe(indices, shown.length, clustering) : help
