//! The linears of a network and their adapters.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use rekindle_lora::LoraFactors;

/// A linear of a network.
#[derive(Debug)]
pub(crate) struct FoundLinear {
    /// The path of the module.
    pub(crate) name: String,
    pub(crate) input: usize,
    pub(crate) out: usize,
    pub(crate) has_bias: bool,
    pub(crate) is_quantized: bool,
    /// The path of the parameter that carries its adapter.
    pub(crate) anchor: String,
    /// Its adapter, in PEFT's orientation.
    pub(crate) factors: Option<LoraFactors>,
}

/// Returns the linears in the order of the network's fields.
pub(crate) fn find_linears<M: Module>(model: &M) -> Vec<FoundLinear> {
    let mut finder = Finder { path: Vec::new(), containers: Vec::new(), found: Vec::new() };
    model.visit(&mut finder);
    finder.found
}

struct Finder {
    path: Vec<String>,
    /// The type of the module that each segment of the path is a field of.
    containers: Vec<String>,
    found: Vec<FoundLinear>,
}

/// Types of linears, and their field that carries the adapter.
const LINEARS: [(&str, &str); 3] =
    [("Struct:Linear", "weight"), ("Struct:LoraLinear", "weight"), ("Struct:QuantLinear", "features")];

/// The field of a quantized weight that has its sizes and carries the adapter of its linear.
const QUANTIZED: (&str, &str) = ("Struct:QuantizedParam", "features");

impl Finder {
    /// Returns true if the current parameter is a field of a linear's adapter.
    fn is_factor(&self) -> bool {
        self.containers.len() >= 2 && self.containers[self.containers.len() - 2] == "Reparameterization"
    }
}

impl ModuleVisitor for Finder {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push(name.to_owned());
        self.containers.push(container.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
        self.containers.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (Some(field), Some(container)) = (self.path.last(), self.containers.last()) else { return };
        let is_factor = self.is_factor();
        let place = (container.as_str(), field.as_str());
        if LINEARS.contains(&place) {
            let is_quantized = place.1 == QUANTIZED.1;
            let [input, out] = match param.lazy_shape().as_slice() {
                _ if is_quantized => sizes(param),
                &[input, out] => [input, out],
                _ => return,
            };
            let name = self.path[..self.path.len() - 1].join(".");
            let anchor = self.path.join(".");
            self.found.push(FoundLinear { name, input, out, has_bias: false, is_quantized, anchor, factors: None });
        } else if let (Some(linear), true) = (self.found.last_mut(), place == QUANTIZED) {
            [linear.input, linear.out] = sizes(param);
            linear.anchor = self.path.join(".");
            linear.is_quantized = true;
        } else if let (Some(linear), true) = (self.found.last_mut(), is_factor) {
            let is_its = self.path[..self.path.len() - 2].join(".") == linear.anchor;
            let &[rows, columns] = param.lazy_shape().as_slice() else { return };
            if !is_its {
                return;
            }
            let values = param.val().into_data_as::<f32>().try_into_vec::<f32>().unwrap_or_default();
            let turned = (0..columns).flat_map(|column| values[column..].iter().step_by(columns).copied()).collect();
            let factors = linear.factors.get_or_insert_with(|| LoraFactors {
                r: 0,
                a: Vec::new(),
                b: Vec::new(),
                magnitude: None,
            });
            match field.as_str() {
                "a" => (factors.r, factors.a) = (columns, turned),
                "b" => (factors.r, factors.b) = (rows, turned),
                _ => {}
            }
        } else if field == "bias"
            && let Some(linear) = self.found.last_mut()
        {
            linear.has_bias |= self.path[..self.path.len() - 1].join(".") == linear.name;
        }
    }
}

/// The sizes `[d_input, d_output]` of a quantized weight.
fn sizes<const D: usize>(features: &Param<Tensor<D>>) -> [usize; 2] {
    let sizes = features.base().into_data_as::<f32>().try_into_vec::<f32>().expect("cast to f32 just before");
    [0, 1].map(|axis| sizes[axis] as usize)
}
