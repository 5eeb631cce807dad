//! Links the guests by the unikernel's script.

fn main() {
    let script = std::env::var("DEP_UNIKERNEL_LINK_SCRIPT").expect("unikernel names its linker script");
    println!("cargo::rerun-if-changed={script}");
    for arg in [&format!("-T{script}"), "--no-pie", "-zmax-page-size=0x1000", "--build-id=none"] {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
}
