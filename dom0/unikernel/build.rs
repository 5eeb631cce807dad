//! Tells the images that link this crate where its linker script is (they read `DEP_UNIKERNEL_LINK_SCRIPT`).

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/link.ld");
    println!("cargo::rerun-if-changed={script}");
    println!("cargo::metadata=link_script={script}");
}
