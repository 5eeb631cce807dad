//! Links the image: one ELF64 file for PVH and Multiboot2 loaders.

fn main() {
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/link.ld");
    println!("cargo::rerun-if-changed={script}");
    for argument in [&*format!("-T{script}"), "--no-pie", "-zmax-page-size=0x1000", "--build-id=none"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
