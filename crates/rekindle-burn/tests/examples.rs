//! Runs the examples.

#[allow(dead_code)]
#[path = "../examples/nf4.rs"]
mod nf4;
#[allow(dead_code)]
#[path = "../examples/transformer.rs"]
mod transformer;

#[test]
fn the_transformer_learns_and_saves_its_adapter() {
    transformer::main().expect("the example runs");
}

#[test]
fn the_adapter_of_an_nf4_network_trains() {
    nf4::main().expect("the example runs");
}
